"""Bytes, launches and predicted time of each op: a model, to hold measurements against. Nothing here is measured.

The floor counts each input read once and each output written once, at the bandwidth of a plain copy. What a design adds
to that on purpose is counted apart: the second read of the kept rows, and the folded text that every row tile of the
score kernel reads again from L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from asymvlm_kernels.tuning.prefill import H100_PROCESSORS
from asymvlm_kernels.tuning.prune import ScoreSelectConfig, Split, score_select_config, split_of
from bench.ops.prefill.shapes import Shape

OPS = ("score_tokens", "select_tokens", "gather_rows", "prune_sequence")
LAUNCHES = {"score_tokens": 2, "select_tokens": 1, "gather_rows": 1, "prune_sequence": 2}  # kernels of the design
SCORE, COUNT, INDEX = 4, 4, 8  # bytes of an fp32 score, an int32 count, an int64 index


@dataclass(frozen=True)
class Device:
    """What the model needs to know of a machine."""

    name: str
    copy_gbs: float  # GB/s of a large copy, bytes read plus bytes written
    launch_us: float  # cost of one more kernel in a stream or graph, microseconds


# Assumptions, replaced by `measured_device` wherever a run is at hand.
ASSUMED = {
    "h100": Device("H100 (model)", copy_gbs=3000.0, launch_us=2.0),
    "h200": Device("H200 (model)", copy_gbs=4300.0, launch_us=2.0),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call."""

    read: int  # from device memory, each input once
    written: int  # to device memory, each output once
    reread: int  # inputs that come round again: from L2 where they fit, else from device memory
    launches: int

    @property
    def minimal(self) -> int:
        return self.read + self.written


def traffic(op: str, shape: Shape, itemsize: int, tile_rows: int = 32) -> Traffic:
    """Byte count of ``op``, written out. ``itemsize``: bytes of an embedding element, 2 or 4.

    ``tile_rows``: vision rows that a program of the score kernel owns. In 16-bit dtypes the folded text is a sum of
    two, so it is twice the text. `prune_sequence` has tiles of its own.
    """
    B, N, D, L, K = shape.B, shape.N, shape.D, shape.L, shape.K
    vision, text, weight = B * N * D * itemsize, B * L * D * itemsize, D * 4
    kept = B * K * D * itemsize
    folded = text * (1 if itemsize == 4 else 2)
    folded_again = (-(-N // tile_rows) - 1) * folded
    if op == "score_tokens":
        read, written, reread = vision + text + weight, B * N * SCORE, folded_again
    elif op == "select_tokens":
        read, written, reread = B * (N * SCORE + COUNT), B * K * INDEX, 0
    elif op == "gather_rows":
        read, written, reread = kept + B * K * INDEX, kept, 0
    elif op == "prune_sequence":  # scores, counts and index need not leave the chip; the sequence does
        masks = 2 * B * shape.S
        config = fused_config(D, itemsize)
        tiles = -(-shape.S // config.block_n)
        text_again = (tiles - 1) * text  # as it lies: the kernel splits it tile by tile
        split = split_of(B * tiles, D, config, H100_PROCESSORS)
        parts = 2 * B * tiles * config.block_n * 4 * shared_columns(L, split, config.block_l)  # written and read, in L2
        vision_again = (-(-L // config.block_l) - 1) * vision if L else 0
        read, written = vision + text + weight + masks, kept + text
        reread = text_again + parts + vision_again + kept + text
    else:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return Traffic(read, written, reread, LAUNCHES[op])


def fused_config(D: int, itemsize: int) -> ScoreSelectConfig:
    """Tiles of `prune_sequence` on an H100."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return score_select_config(D, dtype, 16 // itemsize if D * itemsize % 16 == 0 else 1, 90)


def shared_columns(L: int, split: Split, block_l: int) -> int:
    """Text columns of a tile that lie in scratch, once for each part of the width (see `prefill.prune.parts`)."""
    blocks, per_turn = -(-L // block_l), max(split.parts // 3, 1)
    rest = blocks % split.parts
    if -(-rest // per_turn) > split.rounds:  # taken whole
        return 0
    columns = 0
    while rest:
        of_turn = min(rest, per_turn)
        columns += split.parts // of_turn * min(of_turn * block_l, L)
        rest -= of_turn
    return columns


def floor_us(op: str, shape: Shape, itemsize: int, device: Device) -> float:
    """Microseconds (model) that no version can beat: the minimal bytes at the speed of a copy."""
    return traffic(op, shape, itemsize).minimal / device.copy_gbs / 1e3


def two_read_floor_us(shape: Shape, itemsize: int, device: Device) -> float:
    """Microseconds (model) of score and gather one after the other, the kept rows coming from device memory again."""
    moved = traffic("score_tokens", shape, itemsize).minimal + traffic("gather_rows", shape, itemsize).minimal
    return moved / device.copy_gbs / 1e3


def predicted_us(op: str, shape: Shape, itemsize: int, device: Device) -> float:
    """Microseconds (model) expected of the design: the floor plus its launches. Re-reads from L2 are taken as free."""
    return floor_us(op, shape, itemsize, device) + LAUNCHES[op] * device.launch_us


def measured_device(run: dict[str, Any]) -> Device:
    """The machine of a recorded run: its copy ceiling and launch cost instead of assumed ones."""
    ceiling = run["ceiling"]
    return Device(run["environment"]["device"], ceiling["copy_gbs"], ceiling["launch_us"])
