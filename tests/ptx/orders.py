"""The fused paths under weak memory, as they are and with planted faults, and with barriers left out of kernels.

Prints one JSON object a line: what was done, and what the emulator found, empty where all was right.

    PYTHONPATH=.:tests/static python tests/ptx/orders.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import emulation  # first: it says that kernels are compiled
import faults
import launches_prefill as prefill
import torch
from formats import Fault
from grid import Conditions

from asymvlm_kernels.prefill.prune import known_length

SIZE = (2, 130, 9, 256)  # B, N, L, D
PATHS = {"two launches": known_length._prune_static_triton, "one launch": prefill.pruned_in_one_launch}
PLANTED = {"two launches": ["relaxed arrival"], "one launch": ["relaxed arrival", "relaxed flag", "plain wait"]}
TRIES = 4  # orders of blocks in which a planted fault has to show
PATIENCE = 1500  # turns: four times what these launches take


def found(path: str, arch: int, seed: int, resident: int, change: faults.Change | None = None) -> str:
    """What goes wrong with a prune under weak memory."""
    conditions = Conditions(seed, resident, weak=True, patience=PATIENCE)
    emulated = functools.partial(emulation.emulate, arch, conditions, change=change)
    try:
        prefill.check_prune(PATHS[path], SIZE, torch.bfloat16, emulated)
    except (AssertionError, Fault) as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""


def weak_results(arches: list[int], seeds: int, planted_in: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    for arch in arches:
        for path in PATHS:
            for seed in range(seeds):
                resident = (6, 1, 3, 100)[seed % 4]
                name = f"{path}, {resident} blocks at once"
                yield {"case": name, "arch": arch, "planted": "", "found": found(path, arch, seed, resident)}
            for planted in planted_in[path]:
                change = faults.ORDER[planted]
                errors = (found(path, arch, seed, 6, change) for seed in range(TRIES))
                yield {"case": path, "arch": arch, "planted": planted, "found": next(filter(None, errors), "")}


def dropped_barriers(arch: int, most: int) -> Iterator[dict[str, Any]]:
    """One barrier after the other is left out of two kernels."""
    checks = {
        "_importance_gap_kernel": functools.partial(prefill.check_gap, 256),
        "_score_select_kernel": functools.partial(
            prefill.check_prune, PATHS["two launches"], (1, 64, 9, 256), torch.bfloat16
        ),
    }
    for kernel, check in checks.items():
        texts: list[str] = []
        with contextlib.suppress(Interrupted):
            check(functools.partial(emulation.emulate, arch, change=functools.partial(_keep_text, texts)))
        count = faults.barriers(texts[0])
        for number in range(0, count, -(-count // most)):
            change = functools.partial(faults.without_barrier, number)
            error = ""
            try:
                check(functools.partial(emulation.emulate, arch, change=change))
            except (AssertionError, Fault) as fault:
                error = f"{type(fault).__name__}: {fault}"
            yield {"case": kernel, "arch": arch, "planted": f"barrier {number} of {count} left out", "found": error}


class Interrupted(Exception):
    """The text of the first kernel is known."""


def _keep_text(texts: list[str], text: str) -> str:
    texts.append(text)
    raise Interrupted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--quick", action="store_true", help="sm_90, one seed, a fault for each path, no barriers")
    parser.add_argument("--part", nargs="*", default=["orders", "barriers"], choices=["orders", "barriers"])
    parser.add_argument("--cache", help="keep Triton's builds here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = {"TRITON_CACHE_DIR": args.cache} if args.cache else {}
    with patch.dict(os.environ, cache):
        for result in results(args.quick, args.arch, args.part):
            print(json.dumps(result), flush=True)


def results(quick: bool, arches: list[int], parts: list[str]) -> Iterator[dict[str, Any]]:
    if quick:
        yield from weak_results([90], 1, PLANTED | {"one launch": ["relaxed flag"]})
        return
    if "orders" in parts:
        yield from weak_results(arches, 4, PLANTED)
    for arch in arches if "barriers" in parts else []:
        yield from dropped_barriers(arch, most=16)


if __name__ == "__main__":
    main()
