"""Compile recorded builds into Triton's cache, many at a time: ``ptxas`` and LLVM take a core each."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from asymvlm_kernels.warming.inside import compile_now
from asymvlm_kernels.warming.recording import Build

Outcome = dict[str, Any]  # kernel, key, state, seconds, problem

_builds: list[Build] = []


def distinct(builds: Sequence[Build]) -> list[Build]:
    """One of each compilation, the longest first, so that no worker is left alone with one at the end."""
    found = {build.key: build for build in builds}
    return sorted(found.values(), key=lambda build: -_length(build.source.fn, set()))


def _length(function: Any, seen: set[str]) -> int:
    """Of the source of a kernel and of all functions that it calls, each once: what there is to compile."""
    seen.add(function.__name__)
    names = set(re.findall(r"\w+", function.src)) - seen
    called = [found for name in names if hasattr(found := function.fn.__globals__.get(name), "src")]
    return len(function.src) + sum(_length(found, seen) for found in called if found.__name__ not in seen)


def compile_builds(builds: Sequence[Build], jobs: int) -> Iterator[Outcome]:
    """Compile each build in one of ``jobs`` processes and tell of it when it is done.

    Forks: call it where no other thread runs and no CUDA context is.
    """
    global _builds
    _builds = list(builds)  # forked workers inherit the list: kernels cannot be pickled
    with ProcessPoolExecutor(max(min(jobs, len(_builds)), 1), mp_context=get_context("fork")) as pool:
        waiting: dict[Future[Outcome], int] = {pool.submit(_compile, number): number for number in range(len(_builds))}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                build = _builds[waiting.pop(future)]
                error = future.exception()
                yield future.result() if error is None else _outcome(build, "failed", 0.0, error)


def _compile(number: int) -> Outcome:
    build, started = _builds[number], time.perf_counter()
    try:
        found = compile_now(build.source, build.target, build.options)
    except Exception as error:  # whatever a compiler raises; the others go on
        return _outcome(build, "failed", time.perf_counter() - started, error)
    return _outcome(build, "found" if found else "compiled", time.perf_counter() - started)


def _outcome(build: Build, state: str, seconds: float, error: BaseException | None = None) -> Outcome:
    lines = f"{type(error).__name__}: {error}".strip().splitlines() if error is not None else [""]
    told = {"kernel": build.kernel, "key": build.key, "state": state, "seconds": round(seconds, 3)}
    return told | {"problem": lines[0][:300]}


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
