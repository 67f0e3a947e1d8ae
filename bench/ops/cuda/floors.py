"""Predicted times of the CUDA library's one launch: bytes at the speed of a copy plus a chain of latencies. A model.

Nothing here is measured. The chain is what one block goes through when nothing else hides it; its links are round
figures for an H100 at 1.7 GHz from published latencies (L2 0.27 us, memory 0.6 us, a barrier of a block 30 ns), to be
replaced by what a profiler shows.
"""

from __future__ import annotations

from bench.ops.prefill.floors import COUNT, INDEX, SCORE, Device
from bench.ops.prefill.shapes import Shape

MEMORY_US = 0.6  # first byte from device memory
L2_US = 0.3  # a number that another block wrote
MULTIPLY_US = 0.6  # the last row group, after its rows have arrived: fragments, products, the sum of 8 warps
TEAM_US = 0.9  # a meeting of the cluster and the combination behind it
MEETING_US = 1.2  # the last block's arrival at a sample's counter until all have seen it
RANK_US = 2.4  # histogram, its scan and one search: four passes over the keys and a dozen barriers of the block
SLOTS_US = 0.5  # who is kept before a block's rows, and among them
SELECT_PASS_US = 0.1  # a pass over 2048 keys by 512 threads


def prune_us(shape: Shape, itemsize: int, device: Device) -> float:
    """Microseconds (model) of `prune_sequence` in one launch, V held in shared memory, a uniform budget."""
    rows = shape.B * shape.S * shape.D * itemsize
    kept = shape.B * (shape.K + shape.L) * shape.D * itemsize
    moved = rows + kept + 4 * shape.D + 2 * shape.B * shape.S
    chain = MEMORY_US + MULTIPLY_US + TEAM_US + MEETING_US + L2_US + RANK_US + SLOTS_US
    return device.launch_us + moved / device.copy_gbs / 1e3 + chain


def select_us(shape: Shape, device: Device) -> float:
    """Microseconds (model) of `select_tokens`: one block a row, so bandwidth is no concern."""
    passes = 5 * -(-shape.N // 2048)  # keys; range; histogram; candidates; places
    chain = 2 * MEMORY_US + RANK_US + passes * SELECT_PASS_US
    bytes_ = shape.B * (shape.N * SCORE + COUNT + shape.K * INDEX)
    return device.launch_us + chain + bytes_ / device.copy_gbs / 1e3
