"""A warm-up leaves in Triton's cache what a real call will look for there, and tells what it did."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels.dispatch import BackendError
from asymvlm_kernels.tuning.prefill import select_config
from asymvlm_kernels.tuning.prune import rank_config
from asymvlm_kernels.warming import cache, calls, warm

ROOT = Path(__file__).parents[3]
CALLS = ak.Calls(dtype=torch.bfloat16, gathers=(0,))  # one kernel that compiles in a moment
# Triton's own launch of the kernel up to where it would load it, with a driver that stands for a GPU of sm_90
CALL = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from asymvlm_kernels.prefill.gather import _gather_rows_triton

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
triton.knobs.compilation.listener = lambda *, cache_hit, **_: print("found" if cache_hit else "compiled")
run = JITFunction.run
JITFunction.run = lambda kernel, *args, grid, warmup, **options: run(kernel, *args, grid=grid, warmup=True, **options)
_gather_rows_triton(torch.empty(3, 700, dtype=torch.int64), torch.empty(3, 90, dtype=torch.int64), -1)
"""


def called(folder: Path) -> str:
    """What a call of another size than the warm-up's finds in a cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_call_finds_what_was_warmed_where_the_cache_was_copied_to(tmp_path):
    pytest.importorskip("triton")
    lines: list[str] = []
    warmed = ak.warmup(CALLS, arch=90, jobs=2, folder=tmp_path / "there", progress=lines.append)
    (build,) = warmed.builds
    assert (build.kernel, build.state, build.problem) == ("_gather_rows_kernel", "compiled", "")
    assert (warmed.arch, warmed.folder) == (90, str(tmp_path / "there"))
    assert [line.split(":")[0] for line in lines[1:-1]] == ["1 of 1"]
    assert lines[-1].startswith("1 compiled for sm_90")
    found = cache.describe(warmed.folder)
    assert (found["builds"], found["architectures"]) == (1, {"sm_90": 1})
    assert found["bytes"] > 1000
    shutil.move(tmp_path / "there", tmp_path / "here")
    assert cache.adopt(tmp_path / "here") == 1
    assert called(tmp_path / "here") == "found"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the other process is asked; it answers with one build of each state."""
    asked: list[dict[str, Any]] = []

    def answer(orders: dict[str, Any], folder: str) -> Iterator[dict[str, Any]]:
        asked.append(orders)
        yield {"builds": ["_a 1", "_b 2", "_c 3"], "seconds": 0.1}
        for name, state in (("_a", "compiled"), ("_b", "found"), ("_c", "failed")):
            yield {"kernel": name, "key": "", "state": state, "seconds": 0.1, "problem": "no" * (state == "failed")}
        yield {"done": True}

    monkeypatch.setattr(warm, "_worker", answer)
    return asked


def test_a_stream_that_is_a_file_hears_of_each_build(worker, tmp_path):
    with (tmp_path / "log").open("w") as log:
        warmed = ak.warmup([CALLS, CALLS], arch=80, progress=log)
    said = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("warmup: ") for line in said)
    assert [line.split()[1] for line in said[1:-1]] == ["1", "2", "3"]
    assert said[-2].endswith("_c failed in 0.1 s no")
    assert [build.kernel for build in warmed.of("failed")] == ["_c"]
    assert [calls.from_json(one) for one in worker[0]["calls"]] == [CALLS, CALLS]


def test_any_calls_reach_the_other_process_as_they_are():
    carry = ((), (ak.Carried(-100, 3, torch.int32), ak.Carried()))
    many = ak.Calls(3072, torch.float16, (700,), (True,), carry=carry, heads=((32, 8, 128),), given=True, softcap=True)
    assert calls.from_json(json.loads(json.dumps(calls.to_json(many)))) == many


def test_the_lengths_are_one_of_each_compilation():
    def compiled(S: int) -> tuple[Any, ...]:
        return rank_config(S), select_config(S)

    assert len({compiled(S) for S in calls.LENGTHS}) == len(calls.LENGTHS)
    for S in {*range(1, 70000, 97), *(size + more for size in calls.LENGTHS for more in (-1, 0, 1))}:
        following = next((length for length in calls.LENGTHS if length >= S), calls.LENGTHS[-1])
        assert compiled(S) == compiled(following), S


@pytest.mark.parametrize(
    "wrong,told",
    [
        ({"width": -1}, "width must be 0 or more, got"),
        ({"lengths": (0,)}, "lengths must be 1 or more, got"),
        ({"dtype": torch.float64}, "dtype must be one of bfloat16, float16, float32, got torch.float64"),
        ({"heads": ((3, 2, 8),)}, "with H a multiple of G, got"),
    ],
)
def test_calls_that_cannot_be_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(CALLS, **wrong)


def test_a_process_that_ends_early_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(warm.sys, "executable", shutil.which("false"))
    with pytest.raises((RuntimeError, BrokenPipeError)):
        list(warm._worker({"calls": []}, str(tmp_path)))


def test_what_cannot_be_warmed_is_told(monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be one of 80, 86, .*, got 75"):
        ak.warmup(CALLS, arch=75)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here: arch must name one"):
        ak.warmup(CALLS)
    monkeypatch.setattr(warm, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="needs triton"):
        ak.warmup(CALLS, arch=90)


def test_the_c_compiler_is_looked_for_as_triton_does(monkeypatch, tmp_path):
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CC", str(program))
    assert cache.c_compiler()["path"] == str(program)
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "names no program" in cache.c_compiler()["reason"]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cache.c_compiler()["ok"]
    program.rename(tmp_path / "clang")
    monkeypatch.setattr(cache.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in cache.c_compiler()["reason"]


def test_a_cache_of_others_counts_nothing(tmp_path):
    entry = tmp_path / "KEY"
    entry.mkdir()
    (entry / "__grp__theirs_kernel.json").write_text(json.dumps({"child_paths": {}}))
    (entry / "__grp___gather_rows_kernel.json").write_text("half of a fi")
    assert cache.describe(str(tmp_path))["architectures"] == {"unknown": 1}
    assert cache.adopt(tmp_path) == 1
