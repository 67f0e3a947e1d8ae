"""The steps of `make gpu`: what each runs, how long it may take, and which file it leaves. Most telling first."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asymvlm_kernels.build import nvcc
from asymvlm_kernels.unproven.cuda.library import find
from bench.ops.cuda import check as check_cuda
from bench.ops.decode.shapes import SINGLES as DECODE
from bench.ops.prefill.shapes import BATCHES, SINGLES

API_TESTS = (  # the quick ones that say most
    "tests/api/pruning/test_pruned_equals_masked.py",
    "tests/api/calls/test_prune_inputs.py",
)
CORE_TESTS = ("tests/bench/test_goal_sizes.py", "tests/kernels", "--ignore=tests/kernels/cuda", "-m", "gpu")
GOALS = tuple(shape.name for shape in (*SINGLES[:2], BATCHES[-1], SINGLES[-1]))  # Phi, Gemma, a batch, a large page
SLOTS = tuple(shape.name for shape in DECODE[:6])  # 2k, then 8k
TOOLS = "/usr/local/cuda/bin"  # where NVIDIA installs its own, off the path or not
PROFILED = "regex:_score_select_kernel|_gather_sequence_kernel|_attend_slots_kernel"
JOBS = 16  # compilations at a time


class Skip(Exception):
    """The step cannot run here, for the reason given."""


@dataclass(frozen=True)
class Step:
    """One process of its own. ``limit``: seconds, out of `SECONDS`.

    ``kind``: ending of the step's own file beside the file of the day, which every step is recorded in; empty for none.
    ``takes_rest``: may also use what the steps before it left of their time.
    """

    limit: float
    command: Callable[[argparse.Namespace, Path, float], list[str]]
    kind: str = ""
    takes_rest: bool = False


def beside(file: Path, name: str, kind: str) -> Path:
    """The file of a step: ``2026-11-28-core.xml`` beside ``2026-11-28.json``."""
    return file.with_name(f"{file.stem}-{name}.{kind}")


def warm(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Every kernel of the steps below, many at a time; what a cache that was brought along has is found."""
    if options.device != "cuda" and options.arch is None:
        raise Skip("no CUDA device, and no --arch to compile for")
    command = [sys.executable, "-m", "bench.proof.builds", "--arch", str(options.arch), "--jobs", str(options.jobs)]
    return [*command, "--file", str(beside(file, "warm", "json"))]


def core(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """One test a kernel and dtype at goal sizes, and what only a GPU has: graphs, streams."""
    if options.device != "cuda":
        raise Skip("no CUDA device")
    return [*_suite(file, "core", limit), *_workers(4, "load"), *CORE_TESTS]


def suite(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """All tests of the kernels; a file with failures runs once more in a fresh process."""
    if options.smoke:
        return [*_suite(file, "suite", limit), "tests/bench/test_floors.py"]
    return [*_suite(file, "suite", limit), *_workers(14, "loadfile"), "tests/kernels", *API_TESTS]


def _suite(file: Path, name: str, limit: float) -> list[str]:
    records = beside(file, name, "jsonl")
    return [sys.executable, "-m", "bench.proof.suite", "--records", str(records), "--seconds", f"{limit:.0f}", "--"]


def _workers(most: int, dist: str) -> list[str]:
    """``dist``: "loadfile" where the tests of a file share what they compile, "load" where all is compiled."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count() or 1, most)), "--dist", dist]


def measured(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    command = [sys.executable, "-m", "bench.measure", "--device", options.device, "--file", str(file)]
    command += ["--smoke"] * options.smoke + ["--resume"] * options.resume
    command += ["--threads", str(options.threads)] if options.threads else []
    return [*command, "--seconds", f"{max(limit - 15, limit / 2):.0f}"]  # no case takes as long as the rest


def prune(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """`prune_sequence` at goal sizes: three paths and their eager peers."""
    return [*measured(options, file, limit), "--op", "prune_sequence", *_goals(options)]


def ops(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """The ops that it is made of."""
    return [*measured(options, file, limit), "--op", "score_tokens", "gather_rows", "select_tokens", *_goals(options)]


def _goals(options: argparse.Namespace) -> list[str]:
    chosen = ["--dtype", "bfloat16", "--compiled", "without"]
    return chosen if options.smoke else [*chosen, "--shape", *GOALS]


def decode(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Attention with and without scores and the hole-fill, in the dtype of models."""
    command = [*measured(options, file, limit), "--phase", "decode", "--dtype", "bfloat16"]
    if options.device != "cuda":
        return [*command, "--compiled", "with"]
    return [*command, "--compiled", "without", *([] if options.smoke else ["--shape", *SLOTS])]


def prefill(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """All sizes and types of all prefill ops."""
    command = [*measured(options, file, limit), "--compiled"]
    return [*command, "without" if options.device == "cuda" else "with"]


def compiled(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """The cases with a ``torch.compile`` peer once more, with it: autotuning takes longer than all the rest."""
    if options.device != "cuda":
        raise Skip("part of prefill on a CPU")
    return [*measured(options, file, limit), "--compiled", "only", "--dtype", "bfloat16"]


def flex(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Decode beside FlexAttention, which is compiled too."""
    return [*compiled(options, file, limit), "--phase", "decode"]


def methods(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Column sums of attention and the greedy choices of other methods."""
    return [*measured(options, file, limit), "--phase", "methods", "--compiled", "without"]


def profile(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Nsight Compute on three kernels at Phi's size, as text."""
    log = ["--log-file", str(beside(file, "profile", "txt"))]
    command = [_tool(options, "ncu"), "--set", "full", "--kernel-name", PROFILED, "--launch-count", "3", *log]
    return [*command, sys.executable, "-m", "bench.proof.profiled"]


def memcheck(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Accesses outside of a tensor. Without torch's cache each is an allocation of its own, so they are seen."""
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *_sanitized(options, file, "memcheck")]


def racecheck(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Shared memory that two threads touch without a barrier."""
    return _sanitized(options, file, "racecheck")


def _sanitized(options: argparse.Namespace, file: Path, tool: str) -> list[str]:
    command = [_tool(options, "compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"]
    log = ["--log-file", str(beside(file, tool, "txt"))]
    return [*command, *log, sys.executable, "-m", "bench.harness.exercise", "--device", "cuda", "--one"]


def _tool(options: argparse.Namespace, name: str) -> str:
    if options.device != "cuda":
        raise Skip("no CUDA device")
    found = shutil.which(name) or shutil.which(f"{TOOLS}/{name}")
    if found is None:
        raise Skip(f"{name} is not installed")
    return found


def generate(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """End to end: time to first token, bytes, tokens a second."""
    smoke = ["--size", "tiny", "--batch", "1", "--rounds", "3"]
    return _whole("generate", options, file, smoke if options.smoke else ["--batch", "1", "4", "--rounds", "2"])


def eviction(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """Bytes and time a step of a cache that evicts, beside caches that do not."""
    smoke = ["--size", "tiny", "--tokens", "40", "--threshold", "8", "--rounds", "1"]
    return _whole(
        "eviction", options, file, smoke if options.smoke else ["--tokens", "192", "--threshold", "64", "--rounds", "1"]
    )


def training(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """A training step of the scorer: its gradient by masks and by key-bias attention, time and memory."""
    return _whole("training", options, file, ["--size", "tiny", "--rounds", "1"] if options.smoke else [])


def _whole(name: str, options: argparse.Namespace, file: Path, more: list[str]) -> list[str]:
    command = [sys.executable, "-m", f"bench.bench_{name}", "--device", options.device]
    return [*command, "--file", str(beside(file, name, "json")), *more]


def cuda(options: argparse.Namespace, file: Path, limit: float) -> list[str]:
    """The optional CUDA library: tests, sanitizer, times. Its path may be given by ASYMVLM_CUDA_LIBRARY."""
    if options.device != "cuda":
        raise Skip("no CUDA device")
    if find() is None and not check_cuda.CARRIED.exists() and nvcc() is None:
        raise Skip("no CUDA library (ASYMVLM_CUDA_LIBRARY, build/) and no nvcc to build it")
    command = [sys.executable, "-m", "bench.ops.cuda.check", "--file", str(file)]
    return [*command, *["--smoke"] * options.smoke]


STEPS = {
    "warm": Step(45, warm, "json"),
    "core": Step(40, core, "xml"),
    "prune": Step(50, prune),
    "decode": Step(40, decode),
    "ops": Step(35, ops),
    "profile": Step(35, profile, "txt"),
    "memcheck": Step(35, memcheck, "txt"),
    "racecheck": Step(35, racecheck, "txt"),
    "suite": Step(110, suite, "xml", takes_rest=True),
    "generate": Step(50, generate, "json", takes_rest=True),
    "eviction": Step(30, eviction, "json", takes_rest=True),
    "training": Step(35, training, "json", takes_rest=True),
    "prefill": Step(240, prefill),
    "methods": Step(60, methods),
    "compiled": Step(100, compiled),
    "flex": Step(100, flex),
    "cuda": Step(240, cuda),
}
BY_NAME = ("prefill", "methods", "compiled", "flex", "cuda")  # long, so that the others stay under 9 minutes
TIMED = ("prune", "decode", "ops")  # whose figures a compilation would spoil
SECONDS = sum(step.limit for name, step in STEPS.items() if name not in BY_NAME)


def chosen(options: argparse.Namespace) -> list[str]:
    """The steps of a run, in order."""
    if options.only:
        return list(options.only)
    if options.device == "cpu" and not options.smoke:
        return ["prefill", "decode"]
    return [name for name in STEPS if name not in BY_NAME or options.smoke]
