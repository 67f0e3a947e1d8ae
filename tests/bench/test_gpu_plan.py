"""The plan of `make gpu`: what is compiled before it is timed, and records that outlive a run that is broken off."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench import gpu
from bench.ops.prefill.cases import WrongAnswer
from bench.proof import goals, plan, records, suite
from bench.proof.steps import BY_NAME, GOALS, SECONDS, STEPS, TIMED, chosen

ROOT = Path(__file__).resolve().parents[2]
CUDA = argparse.Namespace(
    device="cuda", smoke=False, resume=False, threads=None, only=None, cache=None, arch=90, limit=None, jobs=2,
    seconds=SECONDS,
)  # fmt: skip


@pytest.fixture(scope="module")
def needs() -> plan.Needs:
    pytest.importorskip("triton")
    return plan.needs(90, CUDA)


@pytest.mark.slow
@pytest.mark.xdist_group("plan of the GPU")
def test_after_the_warm_step_nothing_timed_compiles_anything(needs):
    names = chosen(CUDA)
    counts = plan.new(needs, names)
    assert names[0] == "warm"
    assert {name: count for name, count in counts.items() if count} == {"warm": len(needs["warm"] or ())}
    assert [name for name, count in counts.items() if count is None] == ["suite"]


@pytest.mark.slow
@pytest.mark.xdist_group("plan of the GPU")
def test_each_timed_step_needs_the_kernels_that_it_times(needs):
    def kernels(name: str) -> set[str]:
        return {key.split()[0] for key in needs[name] or ()}

    assert kernels("prune") == {"_score_select_kernel", "_gather_sequence_kernel", "_prune_static_kernel"}
    assert {"_attend_slots_kernel", "_merge_parts_kernel", "_move_slots_kernel"} <= kernels("decode")
    assert {"_score_tokens_kernel", "_gather_rows_kernel", "_select_tokens_kernel"} <= kernels("ops")
    assert {"_key_bias_grad_key_kernel", "_score_tokens_grad_kernel"} <= kernels("training") & kernels("core")
    without = plan.new(needs, TIMED)
    assert all(count for count in without.values()), "steps that nothing warms count what they compile"


def test_the_most_telling_sizes_come_first():
    from bench import measure

    words = STEPS["prune"].command(CUDA, Path("day.json"), 60.0)
    cases = measure.chosen(measure.parse([word if word != "cuda" else "cpu" for word in words[3:]]))
    assert [case.shape.name for case in cases] == [name for name in GOALS if "b64" not in name]  # a CPU has no batch


def test_steps_stay_within_nine_minutes_and_a_dozen_files():
    names = [name for name in STEPS if name not in BY_NAME]
    assert sum(STEPS[name].limit for name in names) == SECONDS <= 540
    assert len([name for name in names if STEPS[name].kind]) + len(("day", "tables")) <= 12


def test_the_dry_run_prints_every_step_with_its_share_and_what_is_new(monkeypatch, capsys):
    told: dict[str, Any] = {"warm": ["a 1"], "prune": ["a 1", "b 2"], "suite": None}
    monkeypatch.setattr(plan, "needs", lambda arch, options: told)
    assert gpu.main(["--dry-run", "--seconds", str(SECONDS / 2), "--only", "warm", "prune", "suite"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2 builds,   1 of them new" in lines["prune"]
    assert f"{STEPS['prune'].limit / 2:.0f} s" in lines["prune"]
    assert "builds unknown" in lines["suite"]
    assert "and what is left" in lines["suite"]


def test_goals_hold_on_a_cpu_and_a_wrong_answer_is_none():
    found = goals.goals("cpu", smoke=True)
    ops = {goal.case.op for goal in found}
    assert ops == {*goals.CASES, *goals.BY_SCORES, *goals.DECODE_CASES, *goals.TRAINING}
    for goal in found:
        if goal.case.dtype != torch.float16:
            goal.check("cpu")
    for op in ("score_gradient", "key_bias_attention"):
        goal = next(goal for goal in found if goal.case.op == op)
        inputs = goal.case.make(torch.Generator().manual_seed(0))
        right = goal.run(inputs)
        wrong = right * 1.1 if isinstance(right, torch.Tensor) else (right[0], right[1] * 1.1)
        with pytest.raises(WrongAnswer):
            goal.case.check(inputs, wrong, 2e-2)


FAILING = """
import os, pytest
BROKEN = not os.environ.get("CUDA_LAUNCH_BLOCKING")  # as a context that an earlier test of the process has spoiled

def test_first(): pass
@pytest.mark.parametrize("number", range(3))
def test_poisoned(number): assert not BROKEN
def test_wrong(): assert False, "truly"
def test_skipped(): pytest.skip("no")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_a.py").write_text(FAILING)
    (folder / "test_b.py").write_text("def test_other(): pass\n")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python_api")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.proof.suite", "--records", "r.jsonl", "--", "test_a.py", "test_b.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, folder / "r.jsonl"


def test_no_failure_hides_another_test_and_a_poisoned_process_is_run_again(ran):
    code, said, file = ran
    assert code == 1
    assert said.splitlines()[-1] == "5 passed, 1 failed, 3 of the first run's failures passed alone"
    lines = records.read(file)
    first = {line["test"]: line["outcome"] for line in lines if not line["again"]}
    assert len(first) == 7
    assert records.failed(lines) == ["test_a.py::test_wrong"]


def test_lines_become_a_junit_file_even_where_the_last_is_half_of_one(ran, tmp_path):
    _, _, file = ran
    lines, xml = tmp_path / "a.jsonl", tmp_path / "a.xml"
    lines.write_text(file.read_text() + '{"test": "test_c.py::te')
    records.to_junit(lines, xml)
    assert not lines.exists()
    first, again = ElementTree.parse(xml).getroot()
    assert (first.get("tests"), first.get("failures"), first.get("skipped")) == ("7", "4", "1")
    assert (again.get("tests"), again.get("failures")) == ("6", "1")
    (failure,) = again.findall("testcase/failure")
    assert "truly" in str(failure.text)


def test_a_second_run_keeps_the_marker_and_drops_the_workers():
    rest = ["--ignore=tests/kernels/cuda", "-m", "gpu"]
    assert suite._options(["-n", "4", "--dist", "loadfile", "tests/bench/a.py", "tests/kernels", *rest]) == rest


def test_what_has_passed_is_not_run_again_and_the_rest_is(tmp_path, monkeypatch, capfd):
    from bench.proof import running
    from bench.proof.steps import Step

    ran: list[str] = []

    def step(name: str, code: int) -> Step:
        return Step(20, lambda *_: ran.append(name) or [sys.executable, "-c", f"raise SystemExit({code})"])

    steps = {"prune": step("prune", 0), "decode": step("decode", 1)}
    for module in (gpu, running):
        monkeypatch.setattr(module, "STEPS", steps)
    args = ["--device", "cpu", "--smoke", "--results", str(tmp_path), "--only", "prune", "decode"]
    assert gpu.main(args) == 1
    assert gpu.main([*args, "--resume"]) == 1
    assert ran == ["prune", "decode", "decode"]
    (tables,) = tmp_path.glob("*/*-tables.md")
    assert "decode: failed" in tables.read_text()
    (day,) = tmp_path.glob("*/????-??-??.json")
    assert json.loads(day.read_text())["parts"]["prune"]["status"] == "passed"
