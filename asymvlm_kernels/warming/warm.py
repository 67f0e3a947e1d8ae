"""`warmup`: compile every kernel that calls to come will need, now and in parallel, instead of during the first calls.

Triton compiles a kernel when a call first needs it, for seconds each. What it compiles lies in its cache on disk, under
a key of the sources, the types and the options; a warm-up writes the same entries, and the first call reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from asymvlm_kernels._triton import HAS_TRITON, TRITON_IMPORT_ERROR
from asymvlm_kernels.dispatch import MINIMUM_CAPABILITY, BackendError
from asymvlm_kernels.warming.cache import folder_of
from asymvlm_kernels.warming.calls import Calls, to_json
from asymvlm_kernels.warming.compiling import cores

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
Progress = Callable[[str], object] | TextIO


@dataclass(frozen=True)
class WarmedBuild:
    """One compilation."""

    kernel: str
    state: str  # "compiled", "found" in the cache, or "failed"
    seconds: float
    problem: str = ""  # why it failed


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did."""

    arch: int
    folder: str  # Triton's cache
    builds: tuple[WarmedBuild, ...]
    seconds: float

    def of(self, state: str) -> list[WarmedBuild]:
        """Those of one state: ``"compiled"``, ``"found"`` or ``"failed"``."""
        return [build for build in self.builds if build.state == state]

    def __str__(self) -> str:
        counts = [f"{len(self.of(state))} {state}" for state in ("compiled", "found", "failed") if self.of(state)]
        return f"{', '.join(counts) or 'nothing to compile'} for sm_{self.arch} in {self.seconds:.1f} s"


def warmup(
    calls: Calls | Iterable[Calls],
    *,
    arch: int | None = None,
    jobs: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Warmed:
    """Compile all kernels that ``calls`` will need into Triton's cache, in parallel processes.

    The very calls are made on CPU tensors, with each launch replaced by its compilation: what is compiled is what a
    real call asks for. Needs no GPU where ``arch`` is given, so a cache may be prepared on another machine: with the
    same package, Triton and Python, into a folder of the same path (or see `asymvlm_kernels.warming.cache.adopt`).

    Args:
        calls: which calls are to come; several `Calls` are warmed together.
        arch: compute capability as one number, 90 for 9.0; None means that of the current CUDA device.
        jobs: compilations at a time; None means one for each processor.
        folder: Triton's cache; None means the one that Triton will use in this process.
        progress: is told of each compilation in one line: a function of it, or a stream such as ``sys.stderr``, which
            may be a file.
    Returns:
        `Warmed`: what was compiled, what was in the cache already, what failed and why, with times.
    Raises:
        ValueError: without ``arch`` where there is no CUDA device, or on an unknown one.
        BackendError: if Triton cannot be imported.
        RuntimeError: if the process that compiles ends early; the message is its own.

    A first launch on a machine also has a C compiler build a small part of Triton's driver, which needs the GPU's
    driver and so is not part of this.
    """
    started = time.perf_counter()
    say = _speaker(progress)
    several = [calls] if isinstance(calls, Calls) else list(calls)
    target = architecture_of(arch)
    place = os.fspath(folder) if folder is not None else folder_of()
    builds: list[WarmedBuild] = []
    number = 0
    jobs = jobs or cores()
    orders = {"calls": [to_json(one) for one in several], "arch": target, "jobs": jobs, "compile": True}
    for record in _worker(orders, place):
        if "builds" in record:
            number = len(record["builds"])
            say(f"{number} builds for sm_{target} into {place}, {min(jobs, number)} at a time")
        elif "state" in record:
            builds.append(WarmedBuild(record["kernel"], record["state"], record["seconds"], record["problem"]))
            told = f"{record['state']} in {record['seconds']:.1f} s"
            say(f"{len(builds)} of {number}: {record['kernel']} {told} {record['problem']}".rstrip())
    warmed = Warmed(target, place, tuple(builds), round(time.perf_counter() - started, 2))
    say(str(warmed))
    return warmed


def planned(calls: Calls | Iterable[Calls], *, arch: int | None = None) -> list[str]:
    """The keys of what `warmup` would compile, without compiling: equal keys are one compilation."""
    several = [calls] if isinstance(calls, Calls) else list(calls)
    orders = {"calls": [to_json(one) for one in several], "arch": architecture_of(arch), "jobs": 1, "compile": False}
    return next(list(record["builds"]) for record in _worker(orders, folder_of()) if "builds" in record)


def architecture_of(arch: int | None) -> int:
    """``arch`` where it is one that the kernels run on, that of the current device for None.

    Raises:
        ValueError: on any other, or where there is no device to ask. BackendError: without Triton.
    """
    if not HAS_TRITON:
        raise BackendError(f"a warm-up needs triton, which cannot be imported: {TRITON_IMPORT_ERROR}")
    least = 10 * MINIMUM_CAPABILITY[0] + MINIMUM_CAPABILITY[1]
    if arch is None:
        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here: arch must name one, such as 90 for capability 9.0")
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
        if arch < least:
            raise ValueError(f"compute capability {major}.{minor} found, {least / 10} or newer wanted")
    elif arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    return arch


def _speaker(progress: Progress | None) -> Callable[[str], object]:
    if progress is None:
        return lambda line: None
    if callable(progress):
        return progress
    stream: TextIO = progress

    def say(line: str) -> None:
        stream.write(f"warmup: {line}\n")
        stream.flush()

    return say


def _worker(orders: dict[str, Any], folder: str) -> Iterator[dict[str, Any]]:
    """What `worker` tells, line by line. Its whole process group ends with this generator."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # it forks: no context, no threads
    command = [sys.executable, "-m", "asymvlm_kernels.warming.worker"]
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            command, env=environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        done = False
        try:
            process.stdin.write(json.dumps(orders))
            process.stdin.close()
            for line in process.stdout:
                record = json.loads(line)
                done = done or "done" in record
                yield record
            if not done:
                code = process.wait()
                said.seek(0)
                last = (said.read().strip().splitlines() or [""])[-1]
                raise RuntimeError(f"the warm-up's process ended with code {code}: {last}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
