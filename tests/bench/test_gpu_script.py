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

ROOT = Path(__file__).resolve().parents[2]


def options(tmp_path: Path, **values: object) -> argparse.Namespace:
    defaults = {"device": "cpu", "smoke": True, "resume": False, "threads": 1, "limit": None}
    return argparse.Namespace(**(defaults | {"results": tmp_path} | values))


def part_that_runs(code: str) -> gpu.Part:
    return gpu.Part(20, lambda *_: [sys.executable, "-c", code])


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


def test_a_failed_part_keeps_the_others_and_their_results(tmp_path, monkeypatch, capfd):
    parts = {"correctness": part_that_runs("print('fine')"), "sanitizer": gpu.PARTS["sanitizer"]}
    parts["prefill"] = part_that_runs("print('it broke'); raise SystemExit(3)")
    monkeypatch.setattr(gpu, "PARTS", parts)
    args = ["--device", "cpu", "--smoke", "--results", str(tmp_path)]
    assert gpu.main(args) == 1
    (file,) = tmp_path.glob("*/*.json")
    recorded = json.loads(file.read_text())["parts"]
    statuses = {name: part["status"] for name, part in recorded.items()}
    assert statuses == {"correctness": "passed", "sanitizer": "skipped", "prefill": "failed"}
    assert recorded["prefill"]["tail"] == ["it broke"]
    parts["prefill"] = part_that_runs("print('mended')")
    assert gpu.main([*args, "--only", "prefill"]) == 0
    recorded = json.loads(file.read_text())["parts"]
    assert (recorded["prefill"]["summary"], recorded["correctness"]["summary"]) == ("mended", "fine")


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch, capfd):
    child = "import time; print('started', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setitem(gpu.PARTS, "prefill", part_that_runs(code))
    assert gpu.run_part("prefill", options(tmp_path, limit=3), tmp_path / "x" / "day.json") == "timeout"
    record = json.loads((tmp_path / "x" / "day.json").read_text())["parts"]["prefill"]
    assert (record["status"], record["tail"]) == ("timeout", ["started"])
    assert record["seconds"] < 15, "the child held the pipe open"


def test_a_machine_that_refuses_the_sanitizer_is_no_failure(tmp_path, monkeypatch, capfd):
    code = "print('========= Error: Device not supported'); raise SystemExit(1)"
    monkeypatch.setitem(gpu.PARTS, "sanitizer", part_that_runs(code))
    assert gpu.run_part("sanitizer", options(tmp_path), tmp_path / "day.json") == "skipped"


def test_parts_stay_within_eight_minutes_and_the_long_ones_in_another_eight():
    limits = {name: part.limit for name, part in gpu.PARTS.items()}
    assert sum(limits.pop(name) for name in gpu.BY_NAME) <= 8 * 60
    assert sum(limits.values()) <= 8 * 60


def test_the_sanitizers_job_agrees_with_the_reference(capsys):
    assert exercise.main(["--device", "cpu"]) == 0
    assert "9 combinations agree" in capsys.readouterr().out
