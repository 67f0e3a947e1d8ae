"""What the longest program of `prune_sequence` runs, counted on the emulator: how often a loop runs, no text shows.

Counted are instructions and barriers of the longest block of `_score_select_kernel`, and the bytes of the embeddings
that all blocks read together, beside the bytes that vision and text have. The part that scores does not depend on the
number of rows, but for how a tile is split, so few stand for many; the selection is counted by itself, on many narrow
rows.

    PYTHONPATH=.:tests/static python tests/ptx/counts.py             # what differs; exit code 1 where something grew
    PYTHONPATH=.:tests/static python tests/ptx/counts.py --update    # take what was found as the baseline
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import emulation  # first: it says that kernels are compiled
import gate
import torch
import triton

from asymvlm_kernels.prefill.prune import two_launches
from asymvlm_kernels.tuning import prune as tuning

ARCH = 90
FIGURES = ("instructions", "barriers", "bytes_read", "bytes")
GROWS = FIGURES[:3]  # the last says how often rows are read
Counts = dict[str, list[int]]
FOLDER = Path(__file__).parent / "baseline"


@dataclass(frozen=True)
class Size:
    """Vision rows, text rows, width and dtype of one sample; work is split as for ``rows`` places of a batch."""

    N: int
    L: int
    D: int
    rows: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        what = f"{self.N} keys" if self.D < 64 else f"D={self.D}, split as {self.rows} places"
        return f"{what}, {self.L} text, {str(self.dtype).removeprefix('torch.')}"


SIZES = (
    Size(64, 30, 3072, 2530),
    Size(64, 40, 3072, 2540),
    Size(64, 40, 3840, 296),
    Size(64, 200, 3840, 456),
    Size(64, 40, 4096, 2920),
    Size(64, 40, 3584, 4136),
    Size(64, 40, 3584, 16424),
    Size(64, 40, 3072, 8 * 2540),
    Size(64, 40, 3072, 64 * 2540),
    Size(250, 9, 16),
    Size(2500, 9, 16),
)


def count(size: Size) -> list[int]:
    """`FIGURES` of the first launch of one prune."""
    S = size.N + size.L
    embeds = torch.randn(1, S, size.D, generator=torch.Generator().manual_seed(0)).to(size.dtype)
    vision = torch.zeros(1, S, dtype=torch.bool)
    vision[:, : size.N] = True
    arguments = (embeds, vision, ~vision, None, torch.ones(size.D), [500_000] * 3, [0.0, 0.0], S)
    split = two_launches.split_of

    def as_asked(tiles: int, D: int, config: tuning.ScoreSelectConfig, processors: int) -> tuning.Split:
        return split(-(-size.rows // config.block_n) or tiles, D, config, processors)

    with emulation.emulate(ARCH) as reports, patch.object(two_launches, "split_of", as_asked):
        two_launches._score_select_triton(*arguments)
    read = sum(report.bytes_read[embeds.untyped_storage().data_ptr()] for report in reports)
    instructions, barriers = (sum(report.longest[at] for report in reports) for at in range(2))  # one after the other
    return [instructions, barriers, read, embeds.nbytes]


def count_all(sizes: Iterable[Size], jobs: int) -> Counts:
    sizes = list(sizes)
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        return dict(zip([size.name for size in sizes], pool.map(count, sizes), strict=True))


def baseline_file(version: str) -> Path:
    return FOLDER / gate.baseline_file(version, "counts").relative_to(gate.FOLDER)


def growth(found: Counts, known: Counts) -> list[str]:
    """Figures beyond the baseline by more than 3 %, and what it lacks."""
    complaints = []
    for name, row in found.items():
        if name not in known:
            complaints.append(f"{name}: not in the baseline")
            continue
        for figure, now, old in zip(GROWS, row, known[name]):
            if now > old + old * 3 // 100:
                complaints.append(f"{name}: {figure} {now}, was {old}")
    return complaints


def difference(found: Counts, known: Counts) -> list[str]:
    lines = []
    for name, row in found.items():
        old = known.get(name, [0] * len(FIGURES))
        moved = [f"{figure} {b}" if a == b else f"{figure} {a} -> {b}" for figure, a, b in zip(FIGURES, old, row)]
        again = row[2] / row[3]
        lines.append(f"{' ' if row == old else '~'} {name}: {', '.join(moved)}; read {again:.2f} times")
    return lines


def save(file: Path, found: Counts) -> None:
    """One size a line, so that a diff reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {row}" for name, row in found.items()) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="a pattern: only sizes with a matching name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", help="keep Triton's builds here")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    if args.update and args.case:
        parser.error("--update needs every size")
    torch.set_num_threads(1)
    with patch.dict(os.environ, {"TRITON_CACHE_DIR": args.cache} if args.cache else {}):
        found = count_all([size for size in SIZES if re.search(args.case, size.name)], args.jobs)
    file = baseline_file(triton.__version__)
    known: Counts = gate.load(file)
    print("\n".join(difference(found, known)))
    if args.update:
        save(file, found)
        print(f"written: {file}")
        return 0
    if not known:
        print(f"no baseline for this Triton: --update writes {file}")
        return 0
    complaints = growth(found, known)
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
