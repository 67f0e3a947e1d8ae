"""bench/gpu.py on a machine without a GPU: the same code paths on tiny sizes, and how it fails."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.harness import exercise
from bench.ops.prefill.cases import CASES
from bench.proof import running, steps

ROOT = Path(__file__).resolve().parents[2]


def options(tmp_path: Path, **values: object) -> argparse.Namespace:
    defaults = {"device": "cpu", "smoke": True, "resume": False, "threads": 1, "cache": None}
    return argparse.Namespace(**(defaults | {"results": tmp_path} | values))


def step_that_runs(code: str) -> steps.Step:
    return steps.Step(20, lambda *_: [sys.executable, "-c", code])


@pytest.mark.slow
def test_direct_call_from_another_folder_writes_results_and_passes(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--smoke", "--threads", "1"]
    done = subprocess.run(
        [*command, "--only", "prefill", "--results", "found"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "found").glob("cpu-*/*.json")
    content = json.loads(file.read_text())
    assert content["parts"]["prefill"]["status"] == "passed"
    assert {key.split("/")[0] for key in content["cases"]} == set(CASES)
    assert content["runs"][0]["environment"]["torch"] == torch.__version__
    assert "| odd | bfloat16 |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path, capsys):
    assert gpu.main(["--results", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "no CUDA device" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> dict[str, steps.Step]:
    """The steps there are, for the test to replace."""
    found = dict(steps.STEPS)
    for module in (gpu, running, steps):
        monkeypatch.setattr(module, "STEPS", found)
    return found


def test_a_failed_step_keeps_the_others_and_their_results(tmp_path, replaced, capfd):
    for name in [name for name in replaced if name not in ("core", "memcheck", "prune")]:
        del replaced[name]
    replaced |= {"core": step_that_runs("print('fine')"), "prune": step_that_runs("print('it broke'); exit(3)")}
    args = ["--device", "cpu", "--smoke", "--results", str(tmp_path)]
    assert gpu.main(args) == 1
    (file,) = tmp_path.glob("*/*.json")
    recorded = json.loads(file.read_text())["parts"]
    statuses = {name: part["status"] for name, part in recorded.items()}
    assert statuses == {"core": "passed", "memcheck": "skipped", "prune": "failed"}
    assert recorded["prune"]["tail"] == ["it broke"]
    replaced["prune"] = step_that_runs("print('mended')")
    assert gpu.main([*args, "--only", "prune"]) == 0
    recorded = json.loads(file.read_text())["parts"]
    assert (recorded["prune"]["summary"], recorded["core"]["summary"]) == ("mended", "fine")


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path, replaced, capfd):
    child = "import time; print('started', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    replaced["prune"] = step_that_runs(code)
    assert running.run_step("prune", options(tmp_path), tmp_path / "x" / "day.json", 3) == "timeout"
    record = json.loads((tmp_path / "x" / "day.json").read_text())["parts"]["prune"]
    assert (record["status"], record["tail"]) == ("timeout", ["started"])
    assert record["seconds"] < 15, "the child held the pipe open"


def test_tests_of_a_step_that_was_broken_off_are_told(tmp_path, replaced, capfd):
    line = json.dumps({"test": "a.py::b", "outcome": "passed", "seconds": 1, "again": False, "told": ""})
    lines = steps.beside(tmp_path / "day.json", "core", "jsonl")
    code = f"import time; open({str(lines)!r}, 'w').write({line!r} + chr(10)); time.sleep(60)"
    replaced["core"] = steps.Step(20, lambda *_: [sys.executable, "-c", code], "xml")
    assert running.run_step("core", options(tmp_path), tmp_path / "day.json", 3) == "timeout"
    assert 'name="b"' in (tmp_path / "day-core.xml").read_text()


@pytest.mark.parametrize("words", running.UNSUPPORTED)
def test_a_machine_that_refuses_a_tool_is_no_failure(words, tmp_path, replaced, capfd):
    replaced["memcheck"] = step_that_runs(f"print('========= Error: {words}'); raise SystemExit(1)")
    assert running.run_step("memcheck", options(tmp_path), tmp_path / "day.json", 20) == "skipped"


def test_the_sanitizers_job_agrees_with_the_reference(capsys):
    assert exercise.main(["--device", "cpu"]) == 0
    assert "9 combinations agree" in capsys.readouterr().out
    assert exercise.main(["--device", "cpu", "--one"]) == 0
    assert "1 combinations agree" in capsys.readouterr().out
