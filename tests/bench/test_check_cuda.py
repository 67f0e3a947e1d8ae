"""bench/ops/cuda/check.py in the emulator: its steps run, a failing one fails it, without a library it is skipped."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

import pytest
import torch

from asymvlm_kernels import build
from asymvlm_kernels.unproven.cuda import library as cuda
from bench.ops.cuda import check as check_cuda
from bench.proof import steps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="here the part itself runs")


@pytest.fixture
def emulator(monkeypatch) -> str:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    path = str(build.build(emulator=True))
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, path)
    return path


@pytest.mark.slow
def test_every_step_runs_and_times_stand_beside_the_others(emulator, tmp_path, capsys):
    file = tmp_path / "day.json"
    assert check_cuda.main(["--device", "cpu", "--smoke", "--file", str(file)]) == 0
    said = capsys.readouterr().out
    assert "9 combinations agree with the reference on cpu" in said
    assert said.splitlines()[-1] == "tests passed; sanitizer: not installed"
    cases = json.loads(file.read_text())["cases"]
    assert {key.split("/")[0] for key in cases} == {"select_tokens", "prune_sequence"}
    assert all("ours, cuda" in case["variants"] for case in cases.values())


def test_a_failing_step_fails(emulator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_cuda, "run", lambda command, variables: (1, ""))
    assert check_cuda.main(["--device", "cpu", "--smoke", "--file", str(tmp_path / "day.json")]) == 1


@pytest.mark.parametrize(
    "code,word",
    [
        ("pass", "clean"),
        ("raise SystemExit(9)", "failed"),
        ("print('Device not supported'); exit(1)", "not supported"),
    ],
)
def test_what_the_sanitizer_says(code, word, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\n{code}\n")
    tool.chmod(0o755)
    assert check_cuda.check_with(str(tool), "racecheck", ["true"], {}) == word


def test_without_a_library_and_a_compiler_the_part_is_skipped(monkeypatch, tmp_path):
    options = argparse.Namespace(device="cuda", smoke=False)
    monkeypatch.setattr(steps, "find", lambda: None)
    monkeypatch.setattr(steps, "nvcc", lambda: None)
    monkeypatch.setattr(check_cuda, "CARRIED", tmp_path / "none.so")
    with pytest.raises(steps.Skip, match="no CUDA library"):
        steps.cuda(options, tmp_path / "x.json", 100)
    (tmp_path / "none.so").write_bytes(b"")
    assert steps.cuda(options, tmp_path / "x.json", 100)[2:4] == ["bench.ops.cuda.check", "--file"]
