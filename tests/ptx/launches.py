"""Run launches of the project's kernels on the emulator, and print what each gave as one JSON object a line.

The first line names all kernels that the cases of tests/static describe, with ``--quick`` those that it samples.

PYTHONPATH=.:tests/static python tests/ptx/launches.py --arch 90 --case "two launches"
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import builds
import emulation  # first: it says that kernels are compiled
import launches_columns
import launches_decode
import launches_greedy
import launches_prefill
import launches_training
import torch
from check import Launch
from grid import PLAIN, Conditions, Report

ARCHITECTURES = (80, 90)
MODULES = (launches_prefill, launches_decode, launches_training, launches_columns, launches_greedy)
TASKS: list[tuple[Launch, int]] = []


def chosen(architectures: list[int], pattern: str, quick: bool) -> list[tuple[Launch, int]]:
    return [
        (launch, arch)
        for arch in architectures
        for launch in all_launches()
        if re.search(pattern, launch.name) and (arch in launch.quick or not quick)
    ]


def all_launches() -> Iterator[Launch]:
    for module in MODULES:
        yield from module.launches()


def run(launch: Launch, arch: int, conditions: Conditions = PLAIN) -> dict[str, Any]:
    """What came of it: an error, or none; which kernels ran, and how long it took."""
    reports: list[Report] = []
    started, error = time.process_time(), ""
    try:
        launch.check(functools.partial(emulation.emulate, arch, conditions, reports=reports))
    except Exception as fault:
        error = f"{type(fault).__name__}: {fault}"
        if not isinstance(fault, (AssertionError, emulation.Fault)):
            error = traceback.format_exc()
    return {
        "case": launch.name,
        "arch": arch,
        "error": error,
        "kernels": [report.name for report in reports],
        "instructions": sum(report.instructions for report in reports),
        "seconds": round(time.process_time() - started, 2),
    }


def run_all(tasks: list[tuple[Launch, int]], jobs: int) -> Iterator[dict[str, Any]]:
    """`run` each, ``jobs`` at a time."""
    global TASKS
    TASKS = tasks  # forked workers inherit the list
    if jobs == 1:
        yield from (run(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(_run_number, range(len(tasks)))


def _run_number(number: int) -> dict[str, Any]:
    return run(*TASKS[number])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--case", default="", help="a pattern: only launches with a matching name")
    parser.add_argument("--quick", action="store_true", help="only what `make test-static` runs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", help="keep Triton's builds here")
    args = parser.parse_args()
    if args.cache:
        os.environ["TRITON_CACHE_DIR"] = args.cache
    torch.set_num_threads(1)
    kernels = {name: kernel for group in builds.GROUPS.values() for name, kernel in group.KERNELS.items()}
    print(json.dumps({"wanted": sorted(name for name, one in kernels.items() if not args.quick or one.sampled != ())}))
    for result in run_all(chosen(args.arch, args.case, args.quick), args.jobs):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
