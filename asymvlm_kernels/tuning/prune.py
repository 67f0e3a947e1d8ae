"""Tile sizes of the two launches of `prune_sequence`.

Score tiles depend on width, dtype and architecture only, never on the batch or on a length: otherwise the last bits of
a row's score would depend on its neighbours. The selection and the copy are exact for any tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from asymvlm_kernels.tuning.prefill import GatherConfig, gather_config

SCRATCH = 64 << 20  # most bytes of partial sums with which two turns are shared
GIVEN_WARPS = 8  # of a program that ranks given scores: 16 keys a thread at 4096 tokens


@dataclass(frozen=True)
class ScoreSelectConfig:
    """One program scores ``block_n`` rows, against ``block_l`` text rows at a time, ``block_d`` columns a step."""

    block_n: int
    block_l: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Split:
    """A tile is scored by ``parts`` programs, 1, 3 or 6, which share the width of a block in ``rounds`` turns at most.

    No score depends on it (see `prefill.prune.parts`).
    """

    parts: int
    rounds: int


@dataclass(frozen=True)
class RankConfig:
    """The last program of a sample ranks it: ``block_s`` keys in registers, or the row re-read in chunks of as many."""

    block_s: int
    chunked: bool


@functools.cache
def score_select_config(D: int, dtype: torch.dtype, vector: int, arch: int) -> ScoreSelectConfig:
    # block_l 64: the usual prompt of 30 to 60 text tokens reads V once.
    # 8 warps: the selection at the end holds 16 keys a thread at 4096 tokens.
    if dtype == torch.float32:
        block_n, block_d, num_stages = 32, 16, 4  # FMA; steps of 32 columns spill
    elif vector == 1:
        block_n, block_d, num_stages = 64, 32, 2  # 2-byte loads cannot be asynchronous
    elif arch == 90 and dtype == torch.bfloat16:
        block_n, block_d, num_stages = 64, 64, 4
    else:  # steps of 64 columns spill: operands in registers, or the lift of fp16
        block_n, block_d, num_stages = 64, 32, 6
    # With 64 spill loads of 2 bytes, fp16 with its lift on sm_100, and fp32 on sm_120; Triton 3.6 would take TF32 for
    # fp32 on sm_100.
    narrow = vector == 1 or (dtype != torch.bfloat16 and arch // 10 == 10) or (dtype == torch.float32 and arch >= 120)
    block_l = 32 if narrow else 64
    return ScoreSelectConfig(block_n, block_l, block_d, num_warps=8, num_stages=num_stages)


@functools.cache
def split_of(tiles: int, D: int, config: ScoreSelectConfig, processors: int) -> Split:
    """The split with the shortest chain of steps, for ``tiles`` tiles of the whole batch and text of one block.

    One program fits a processor (registers), so programs run in waves; each costs about as much as five steps beside
    its own.
    """
    steps = -(-D // config.block_d)
    parts = min((1, 3, 6), key=lambda parts: -(-tiles * parts // processors) * (-(-steps // parts) + 5))
    block = parts * tiles * config.block_n * config.block_l * 4  # bytes of a shared turn
    return Split(parts, 0 if parts == 1 else 2 if 2 * block <= SCRATCH else 1)


@functools.cache
def rank_config(S: int) -> RankConfig:
    # few sizes, few compilations; 32 keys a thread, twice that spills
    block_s = next((size for size in (1024, 4096, 8192) if size >= S), 0)
    return RankConfig(block_s or 4096, chunked=not block_s)


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
