"""Tile sizes of the prefill kernels.

Score tiles depend on dtype and architecture only, never on the batch or on a length: otherwise the last bits of a
row's score would depend on its neighbours. Copies and integer selections are exact for any tile, so theirs may.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

SMALL_SHARED_MEMORY = (86, 87, 89, 120, 121)  # 99 KB a block, against 163 KB (sm_80) and 227 KB (sm_90, sm_100, sm_103)


@dataclass(frozen=True)
class FoldConfig:
    """One program folds one text row, held in registers."""

    block_d: int
    num_warps: int


@dataclass(frozen=True)
class ScoreConfig:
    """One program scores ``block_n`` vision rows, ``block_l`` text rows at a time, ``block_d`` columns a step.

    ``registers``: most of a thread; where ptxas chooses, it aims lower and spills what only odd rows need.
    """

    block_n: int
    block_l: int
    block_d: int
    num_warps: int
    num_stages: int
    registers: int | None = None


@dataclass(frozen=True)
class GradConfig:
    """One program sums ``block_d`` columns over ``rows`` rows, ``block_n`` rows a step."""

    rows: int
    block_n: int
    block_d: int
    num_warps: int


@dataclass(frozen=True)
class SelectConfig:
    """One program ranks one sample: ``block_n`` keys held in registers, or the row re-read in chunks of as many.

    The index is written ``width`` places a thread at a time.
    """

    block_n: int
    width: int
    chunked: bool
    num_warps: int


@dataclass(frozen=True)
class GatherConfig:
    """One program copies ``block_d`` columns of ``block_k`` kept rows."""

    block_k: int
    block_d: int
    num_warps: int


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability of ``device`` as one number, 90 for 9.0. The interpreter counts as 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


H100_PROCESSORS = 132


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``. A CPU counts as four: the interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def fold_config(D: int) -> FoldConfig:
    block_d = _power_of_two(D)
    return FoldConfig(block_d, num_warps=min(max(block_d // 512, 1), 16))  # 16 columns a thread: two 128-bit bf16 loads


@functools.cache
def score_config(dtype: torch.dtype, vector: int, arch: int) -> ScoreConfig:
    # block_l 64: the usual prompt of 30 to 60 text tokens reads V once.
    # block_n 32: 2500 rows are 79 programs, and the text is read from L2 79 times, not 157 as with 16 rows.
    # block_d 64: 128 needs 255 registers on sm_80 and spills.
    if (
        dtype == torch.float32
    ):  # FMA: steps of 64 columns or 4 warps spill; with block_l 64 Triton 3.6 uses TF32 on sm_100
        return ScoreConfig(32, 32, 32, num_warps=8, num_stages=3, registers=127)
    if vector == 1:
        # 2-byte loads cannot be asynchronous; 4 warps spill, so do blocks of 64 texts on sm_100 and of 32 on sm_80
        return ScoreConfig(32, 32 if arch in (100, 103) else 64, 64, num_warps=8, num_stages=2)
    if arch < 90 or arch in SMALL_SHARED_MEMORY:
        return ScoreConfig(32, 64, 64, num_warps=4, num_stages=4, registers=255)  # 60 KB: one program an SM
    return ScoreConfig(32, 64, 64, num_warps=4, num_stages=5)  # 96 to 100 KB: two programs share the 227 KB of an SM


@functools.cache
def grad_config(D: int, itemsize: int, vector: int) -> GradConfig:
    # 512 bytes of a row, so that 3072 bf16 columns x 2500 rows are 240 programs; partial sums are 3 % of V
    block_d = min(_power_of_two(D), 512 // itemsize)
    return GradConfig(rows=128, block_n=16 if vector > 1 else 8, block_d=block_d, num_warps=4)


@functools.cache
def select_config(N: int) -> SelectConfig:
    block_n = max(_power_of_two(N), 128)
    num_warps = min(max(block_n // 256, 4), 16)  # 8 keys a thread hide the latency of a reduction; 32 warps spill
    width = min(block_n // (32 * num_warps), 4)  # 8 spill with 16 warps
    chunked = block_n > 16384  # twice that would spill, and overflow the packed 16-bit counts
    return SelectConfig(4096 if chunked else block_n, width, chunked, num_warps)


@functools.cache
def gather_config(D: int, itemsize: int) -> GatherConfig:
    block_d = min(_power_of_two(D), 2048 // itemsize)  # 2 KB of a row: 128 threads of 16 bytes
    block_k = min(8192 // (block_d * itemsize), 256)  # 8 KB a program, and enough programs where rows are a few bytes
    return GatherConfig(block_k, block_d, num_warps=4)


def row_vector(rows: torch.Tensor) -> int:
    """How many elements divide the width and every row offset of ``(B, S, D)``: 16 bytes of them, or 1.

    Triton sees that a stride is a multiple of 16 elements, not that a stride of 8 bf16 is 16 bytes. The stride of an
    axis of size 1 does not count, or a row would be summed in another order alone than in a batch.
    """
    wide = 16 // rows.itemsize
    strides = [stride for size, stride in zip(rows.shape[:2], rows.stride()[:2], strict=True) if size > 1]
    return wide if all(number % wide == 0 for number in (rows.shape[2], *strides)) else 1


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
