"""Everything a GPU should prove, in one command: ``make gpu``, or ``python bench/gpu.py`` in a bare checkout.

Each part runs in a process of its own with a time limit, and what it found is written at once, so a part that fails or
hangs loses nothing of the others. Results go to ``bench/results/<device>/<date>.json``; a second run merges into the
file of the day, and ``--resume`` skips the cases that the same sources have measured. It takes at most 8 minutes; the
peers that torch.compile tunes and the optional CUDA library run by name: ``make gpu ARGS="--only compiled cuda"``.
Exit code: 0 all passed, 1 a part failed, 2 no such device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

import torch  # noqa: E402

from asymvlm_kernels.build import nvcc  # noqa: E402
from asymvlm_kernels.unproven.cuda.library import find  # noqa: E402
from bench.harness import environment, results, tables  # noqa: E402
from bench.ops.cuda import check as check_cuda  # noqa: E402

API_TESTS = (  # the quick ones that say most
    "tests/api/pruning/test_pruned_equals_masked.py",
    "tests/api/calls/test_prune_inputs.py",
)
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
UNSUPPORTED = "Device not supported"  # how the sanitizer refuses some virtual machines
# glibc hands fresh pages back after every large tensor; their faults would be most of a CPU measurement, and vary
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class Skip(Exception):
    """The part cannot run here, for the reason given."""


@dataclass(frozen=True)
class Part:
    limit: int  # seconds
    command: Callable[[argparse.Namespace, Path, int], list[str]]


def correctness(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    workers = ["-n", str(min(os.cpu_count() or 1, 8))] if importlib.util.find_spec("xdist") else []
    tests = ["tests/bench/test_floors.py"] if options.smoke else ["tests/kernels", *API_TESTS]
    if options.smoke:
        workers = []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=30", *workers, *tests]


def sanitizer(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    # without torch's cache each tensor is an allocation of its own, so that reading past its end is seen
    no_cache = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    tool = next((found for name in SANITIZER if (found := shutil.which(name))), None)
    if options.device != "cuda":
        raise Skip("no CUDA device")
    if tool is None:
        raise Skip("compute-sanitizer is not installed")
    exercise = [sys.executable, "-m", "bench.harness.exercise", "--device", "cuda"]
    return [*no_cache, tool, "--tool", "memcheck", "--error-exitcode", "9", *exercise]


def prefill(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    command = [sys.executable, "-m", "bench.measure", "--device", options.device, "--file", str(file)]
    command += ["--smoke"] * options.smoke + ["--resume"] * options.resume
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--compiled", "without"] if options.device == "cuda" else []
    return [*command, "--seconds", str(limit - 40)]  # no case takes as long as the rest


def decode(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """Attention with and without scores and the hole-fill, in the dtype of models."""
    return [*prefill(options, file, limit), "--phase", "decode", "--compiled", "with", "--dtype", "bfloat16"]


def compiled(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """The cases with a ``torch.compile`` peer once more, with it: autotuning takes longer than all the rest."""
    if options.device != "cuda":
        raise Skip("part of prefill on a CPU")
    command = [sys.executable, "-m", "bench.measure", "--device", "cuda", "--file", str(file), "--compiled", "only"]
    command += ["--dtype", "bfloat16"] + ["--smoke"] * options.smoke + ["--resume"] * options.resume
    return [*command, "--seconds", str(limit - 60)]


def generate(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """End to end, in a file of its own beside the other results."""
    command = [sys.executable, "-m", "bench.bench_generate", "--device", options.device]
    command += ["--file", str(file.with_name(f"{file.stem}-generate.json")), "--rounds", "3"]
    return [*command, *(["--size", "tiny", "--batch", "1"] if options.smoke else [])]


def cuda(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """The optional CUDA library: tests, sanitizer, times. Its path may be given by ASYMVLM_CUDA_LIBRARY."""
    if options.device != "cuda":
        raise Skip("no CUDA device")
    if find() is None and not check_cuda.CARRIED.exists() and nvcc() is None:
        raise Skip("no CUDA library (ASYMVLM_CUDA_LIBRARY, build/) and no nvcc to build it")
    command = [sys.executable, "-m", "bench.ops.cuda.check", "--file", str(file)]
    return [*command, *["--smoke"] * options.smoke]


def eviction(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """Bytes and time a step of a cache that evicts, beside caches that do not."""
    command = [sys.executable, "-m", "bench.bench_eviction", "--device", options.device]
    command += ["--file", str(file.with_name(f"{file.stem}-eviction.json"))]
    smoke = ["--size", "tiny", "--tokens", "40", "--threshold", "8", "--rounds", "1"]
    return [*command, *(smoke if options.smoke else ["--tokens", "192", "--threshold", "64", "--rounds", "1"])]


def training(options: argparse.Namespace, file: Path, limit: int) -> list[str]:
    """A training step of the scorer: its gradient by masks and by key-bias attention, time and memory."""
    command = [sys.executable, "-m", "bench.bench_training", "--device", options.device]
    command += ["--file", str(file.with_name(f"{file.stem}-training.json"))]
    return [*command, *(["--size", "tiny", "--rounds", "1"] if options.smoke else [])]


PARTS = {
    "correctness": Part(120, correctness),
    "sanitizer": Part(50, sanitizer),
    "prefill": Part(100, prefill),
    "decode": Part(70, decode),
    "generate": Part(70, generate),
    "eviction": Part(35, eviction),
    "training": Part(35, training),
    "compiled": Part(100, compiled),
    "cuda": Part(240, cuda),
}
BY_NAME = ("compiled", "cuda")  # long, so that the others stay under 8 minutes: --only compiled cuda


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(PARTS), help=f"parts to run; {' and '.join(BY_NAME)} run only if named"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: tests this script, measures nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="skip cases measured already with these sources")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--limit", type=int, help="seconds a part, instead of its own limit")
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: torch sees no CUDA device here (--device cpu measures the CPU)", file=sys.stderr)
        return 2
    names = options.only or [name for name in PARTS if name not in BY_NAME or options.smoke]
    if not options.only and options.device == "cpu" and not options.smoke:
        names = ["prefill", "decode"]
    file = options.results.resolve() / environment.device_slug(options.device) / f"{datetime.now(UTC):%Y-%m-%d}.json"
    statuses = [run_part(name, options, file) for name in names]
    print(tables.summary(results.load(file)), flush=True)
    print(f"results: {file}", flush=True)
    return 1 if {"failed", "timeout"} & set(statuses) else 0


def run_part(name: str, options: argparse.Namespace, file: Path) -> str:
    """Run one part, record it in ``file`` and return its status: passed, failed, timeout or skipped."""
    part = PARTS[name]
    limit = options.limit or part.limit
    record: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        command = part.command(options, file.relative_to(ROOT) if file.is_relative_to(ROOT) else file, limit)
    except Skip as reason:
        print(f"== {name}: skipped, {reason}", flush=True)
        results.add_part(file, name, record | {"status": "skipped", "summary": str(reason)})
        return "skipped"
    print(f"== {name}, at most {limit} s: {shown(command)}", flush=True)
    started = time.monotonic()
    code, lines = stream(command, child_environment(options.device), limit)
    status = "timeout" if code is None else "failed" if code else "passed"
    if status == "failed" and name == "sanitizer" and any(UNSUPPORTED in line for line in lines):
        status = "skipped"
    said = [line for line in lines if line.strip()]
    record |= {"status": status, "seconds": round(time.monotonic() - started, 1), "command": shown(command)}
    record |= {"source": environment.source_digest(), "summary": said[-1] if said else ""}
    results.add_part(file, name, record if status == "passed" else record | {"tail": said[-40:]})
    print(f"== {name}: {status} in {record['seconds']} s", flush=True)
    return status


def stream(command: list[str], variables: dict[str, str], limit: int) -> tuple[int | None, list[str]]:
    """Run a command, echo its output line by line, and end its whole process group at ``limit`` seconds."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    output = process.stdout

    def echo() -> None:
        for line in output:
            lines.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=echo, daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if code is None:  # out of time, or interrupted from the keyboard
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(5)
    return code, lines


def shown(command: list[str]) -> str:
    """A command as one would type it: results name no path of the machine they come from."""
    return shlex.join("python" if word == sys.executable else word for word in command)


def child_environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    variables |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    variables["BENCH_COMMAND"] = shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])  # what the results name
    return variables | (KEEP_PAGES if device == "cpu" else {})


if __name__ == "__main__":
    raise SystemExit(main())
