"""Tile sizes of the two launches of `prune_sequence`.

Score tiles depend on width, dtype and architecture only, never on the batch or on a length: otherwise the last bits of
a row's score would depend on its neighbours. The selection and the copy are exact for any tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from asymvlm_kernels.tuning.prefill import GatherConfig, gather_config

GIVEN_WARPS = 8  # of a program that ranks given scores: 16 keys a thread at 4096 tokens
WARP_GROUPS = (90, 100, 103)  # matrix products read both operands from shared memory


@dataclass(frozen=True)
class ScoreSelectConfig:
    """One program scores ``block_n`` rows over one of ``parts`` parts of the width, ``block_d`` columns a step.

    ``block_l`` text rows at a time. A row with more text is split over its text instead.
    """

    block_n: int
    block_l: int
    block_d: int
    parts: int
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
        block_n, block_d, num_stages = 32, 32, 2 if arch == 120 else 3  # FMA
    elif vector == 1:
        block_n, block_d, num_stages = 64, 32, 2  # 2-byte loads cannot be asynchronous
    elif arch in WARP_GROUPS:
        block_n, block_d, num_stages = 64, 64, 4
    else:
        block_n, block_d, num_stages = 64, 32, 6  # steps of 64 columns spill where operands live in registers
    steps = -(-D // block_d)
    return ScoreSelectConfig(block_n, 32, block_d, min(3, max(steps, 1)), num_warps=8, num_stages=num_stages)


@functools.cache
def rank_config(S: int) -> RankConfig:
    block_s = max(1 << max(S - 1, 0).bit_length(), 512)  # few sizes, few compilations
    chunked = block_s > 8192  # 32 keys a thread; twice that spills
    return RankConfig(4096 if chunked else block_s, chunked)


@functools.cache
def one_launch_config(D: int, itemsize: int, vector: int, num_warps: int) -> GatherConfig:
    """Rows and columns of a copy by a program as large as one that scores: one fits an SM, so each moves 32 KB."""
    wide = gather_sequence_config(D, itemsize, vector)
    rows = 4 if vector > 1 else 2  # 8 loads of 16 bytes a thread of 8 warps
    return GatherConfig(max(wide.block_k * rows * num_warps // 8, 1), wide.block_d, num_warps)


@functools.cache
def gather_sequence_config(D: int, itemsize: int, vector: int) -> GatherConfig:
    config = gather_config(D, itemsize)
    if vector > 1:
        return config
    return GatherConfig(max(config.block_k // 4, 1), config.block_d, config.num_warps)  # narrow loads of 8 KB spill
