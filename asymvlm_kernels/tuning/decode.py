"""Tile sizes of the decode kernels, and into how many parts a cache is split.

Neither depends on the batch, on the lengths of its samples or on the number of SMs: a sample's output has the same bits
alone and in any batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from asymvlm_kernels.tuning.prefill import SMALL_SHARED_MEMORY

WARP_GROUPS = (90, 100, 103)  # matrix products read both operands from shared memory
PROGRAMS = 256  # of one sample: two for each of the 132 SMs of an H100, at most
MINIMUM_BYTES = (
    32768  # of K and V that a program reads: its partial output (rows x D in fp32) stays some per cent of it
)


@dataclass(frozen=True)
class AttendConfig:
    """One program owns ``block_r`` rows that share a key head and streams their slots, ``block_n`` a step.

    ``block_d`` is the head width, rounded up to a power of two.
    """

    block_r: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MergeConfig:
    """Merges ``block_p`` parts of a row at a time; scores ``block_s`` slots over ``block_h`` heads at a time."""

    block_p: int
    block_s: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class MoveConfig:
    """One program moves ``block_m`` rows of ``block_w`` words at a time; ``workers`` of them share a row's moves."""

    block_m: int
    block_w: int
    workers: int
    num_warps: int


@functools.cache
def attend_config(rows: int, D: int, dtype: torch.dtype, vector: int, indirect: bool, arch: int) -> AttendConfig:
    """``rows``: query rows that share a key head. ``indirect``: a load of positions decides which slots are read."""
    block_d = max(power_of_two(D), 16)
    # 16 rows are the least that an MMA takes, 64 the least of a warp group's; else 64 rows spill
    block_r = min(max(power_of_two(rows), 16), 64 if arch in WARP_GROUPS and block_d <= 128 else 32)
    if dtype == torch.float32:  # FMA: 32 slots x 128 columns spill
        return AttendConfig(16, 32 if block_d <= 64 else 16, block_d, 4 if block_d <= 64 else 8, num_stages=2)
    num_warps = 8 if block_r * block_d >= 64 * 128 else 4  # else the sums spill
    if vector == 1:  # 2-byte loads cannot be asynchronous
        return AttendConfig(block_r, 32 if block_d <= 128 else 16, block_d, num_warps, num_stages=2)
    # 64 slots x 128 columns of K and V are 32 KB. Two such steps are on their way for each of two programs of an SM,
    # one where an SM has 99 KB. Triton halves the distance where positions are loaded first.
    ahead = 1 if arch in SMALL_SHARED_MEMORY else 2
    num_stages = 1 + (2 * ahead if indirect else ahead)
    return AttendConfig(block_r, 64 if block_d <= 128 else 32, block_d, num_warps, num_stages)


@functools.cache
def score_lse_config(D: int, dtype: torch.dtype, vector: int, arch: int) -> AttendConfig:
    config = attend_config(16, D, dtype, vector, False, arch)
    # 32 slots: 64 programs for 2048 slots, each of which takes all heads in turn
    return AttendConfig(16, min(config.block_n, 32), config.block_d, config.num_warps, config.num_stages)


@functools.cache
def column_sums_config(rows: int, D: int, dtype: torch.dtype, vector: int, arch: int) -> AttendConfig:
    """Rows and slots of a tile of logits: no output is summed beside them, so that tiles may be larger."""
    config = attend_config(rows, D, dtype, vector, False, arch)
    if dtype == torch.float32 or vector == 1:
        return config
    block_r = min(max(power_of_two(rows), 16), 64)
    num_warps = 8 if block_r == 64 and arch >= 100 else 4  # with 4 a cap spills there, on sm_100 by Triton 3.6
    return AttendConfig(block_r, config.block_n, config.block_d, num_warps, config.num_stages)


@functools.cache
def merge_config(block_d: int) -> MergeConfig:
    # 16 parts x 256 columns are 32 numbers a thread, 32 heads x 64 slots 16. The other number of heads spills 2 words
    # on sm_120 (256 columns) or sm_90 (128, Triton 3.6).
    return MergeConfig(block_p=16, block_s=64, block_h=32 if block_d > 128 else 16, num_warps=4)


def split_slots(S: int, G: int, tiles: int, row_bytes: int, block_n: int, num_splits: int) -> int:
    """Slots of one part, a multiple of ``block_n``. ``tiles``: row tiles of a key head, ``row_bytes``: of K and V.

    A function of sizes that a model and its cache fix, so a cache that grows changes it at powers of two only.
    """
    if num_splits > 0:
        return max(-(-S // (num_splits * block_n)), 1) * block_n
    wanted = power_of_two(-(-S * G * tiles // PROGRAMS))
    least = power_of_two(-(-MINIMUM_BYTES // row_bytes))
    return max(wanted, least, block_n)


def head_vector(*tensors: torch.Tensor) -> int:
    """How many elements divide D and every row offset of ``(B, S, G, D)`` tensors: 16 bytes of them, or 1.

    The stride of an axis of size 1 does not count.
    """
    wide = 16 // tensors[0].itemsize
    numbers = [tensors[0].shape[-1]]
    for tensor in tensors:
        numbers += [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]) if size > 1]
    return wide if all(number % wide == 0 for number in numbers) else 1


def power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def move_config(row_words: int, word_bytes: int) -> MoveConfig:
    """``row_words``: contiguous words of a slot that move together, those of one head in a cache."""
    block_w = min(power_of_two(row_words), 2048 // word_bytes)  # 2 KB of a row
    block_m = min(max(8192 // (block_w * word_bytes), 1), 2048 // block_w)  # 8 KB on their way, 16 words a thread
    # 96 tensors x 8 heads are 768 programs already; four workers for those of few heads
    return MoveConfig(block_m, block_w, workers=4, num_warps=4)


@functools.cache
def plan_config(S: int) -> int:
    """Slots that `plan_moves` takes at a time."""
    return min(max(power_of_two(S), 128), 2048)
