"""Tile sizes of the two launches of `prune_sequence`.

Score tiles depend on width, dtype and architecture only, never on the batch or on a length: otherwise the last bits of
a row's score would depend on its neighbours. The selection and the copy are exact for any tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScoreSelectConfig:
    """One program scores ``block_n`` rows over one of ``splits`` parts of the width, ``block_d`` columns a step.

    ``block_l`` text rows at a time. A row with more text is split over its text instead.
    """

    block_n: int
    block_l: int
    block_d: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RankConfig:
    """The last program of a sample ranks it: ``block_s`` keys in registers, or the row re-read in chunks of as many."""

    block_s: int
    chunked: bool


@functools.cache
def score_select_config(D: int, dtype: torch.dtype, vector: int, arch: int) -> ScoreSelectConfig:
    # 64 rows x 3 parts: 120 programs for 2500 rows, and partial sums of 32 text columns stay below 1 MiB.
    # 8 warps: the selection at the end holds 16 keys a thread at 4096 tokens.
    if dtype == torch.float32:
        block_n, block_d, num_stages = 32, 32, 3  # FMA
    elif vector == 1:
        block_n, block_d, num_stages = 64, 64, 2  # 2-byte loads cannot be asynchronous
    else:
        block_n, block_d, num_stages = 64, 64, 4
    steps = -(-D // block_d)
    return ScoreSelectConfig(block_n, 32, block_d, min(3, max(steps, 1)), num_warps=8, num_stages=num_stages)


@functools.cache
def rank_config(S: int) -> RankConfig:
    block_s = max(1 << max(S - 1, 0).bit_length(), 512)  # few sizes, few compilations
    chunked = block_s > 8192  # 32 keys a thread; twice that spills
    return RankConfig(4096 if chunked else block_s, chunked)
