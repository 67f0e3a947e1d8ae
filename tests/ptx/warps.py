"""Exchange within a warp: shuffles, reductions, votes, and 8 x 8 matrices to and from shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from formats import TYPES, WARP, WORDS, Array, Mask, Unsupported
from instructions import Step, makes, put, whole_warps
from program import Instruction, elements
from registers import Layout
from traffic import addresser

if TYPE_CHECKING:
    from block import Block

LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, LANE % 4 * 2  # of the first of two numbers that a lane holds of an 8 x 8 matrix
MATRICES = {"x1": 1, "x2": 2, "x4": 4}


@makes("shfl", "sync up down bfly idx")
def shfl(layout: Layout, ins: Instruction) -> Step:
    mode = ins.modifiers[1]
    target, _, valid = ins.operands[0].partition("|")
    value, number, clamp = (layout.read(operand, "b32") for operand in ins.operands[1:4])
    to, flag = layout.write(target, "b32"), layout.write(valid, "pred") if valid else None

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        a, b, c = (block.views[view].reshape(-1, WARP).astype(np.int64) for view in (value, number, clamp))
        segment, most = c >> 8 & 31, c & 31
        last = LANE & segment | most & ~segment
        lane = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": LANE & segment | b & 31 & ~segment}[mode]
        inside = lane >= last if mode == "up" else lane <= last
        found = np.take_along_axis(a, np.where(inside, lane, LANE) & 31, 1)
        put(block.views[to], found.reshape(-1).astype(np.uint32), mask)
        if flag is not None:
            put(block.views[flag], inside.reshape(-1), mask)

    return step


REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@makes("redux", f"sync {' '.join(REDUCTIONS)}")
def redux(layout: Layout, ins: Instruction) -> Step:
    ufunc, dtype = REDUCTIONS[ins.modifiers[1]], TYPES[ins.kind]
    if dtype.kind == "f":
        raise Unsupported(f"redux of {ins.kind} is not emulated: {ins}")
    source, target = layout.read(ins.operands[1], ins.kind), layout.write(ins.operands[0], ins.kind)

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        found = ufunc.reduce(block.views[source].reshape(-1, WARP), 1, dtype=dtype)
        put(block.views[target], np.repeat(found, WARP), mask)

    return step


@makes("vote", "sync ballot any all")
def vote(layout: Layout, ins: Instruction) -> Step:
    mode, source = ins.modifiers[1], layout.read(ins.operands[1], "pred")
    target = layout.write(ins.operands[0], ins.kind)

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        votes = block.views[source].reshape(-1, WARP)
        if mode == "ballot":
            found: Any = (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, dtype=np.uint32)
        else:
            found = votes.any(1) if mode == "any" else votes.all(1)
        put(block.views[target], np.repeat(found, WARP), mask)

    return step


def _matrices(ins: Instruction, registers: list[str]) -> tuple[int, bool]:
    count = next(MATRICES[modifier] for modifier in ins.modifiers if modifier in MATRICES)
    if "m8n8" not in ins.modifiers or ins.kind != "b16" or count != len(registers):
        raise Unsupported(f"{ins}: 8 x 8 matrices of 16-bit numbers are wanted")
    return count, "trans" in ins.modifiers


def _acting_warps(mask: Mask, block: Block) -> Array:
    return np.arange(len(block.threads) // WARP) if mask is True else np.flatnonzero(mask.reshape(-1, WARP)[:, 0])


@makes("ldmatrix", "sync aligned m8n8 trans shared shared::cta x1 x2 x4")
def ldmatrix(layout: Layout, ins: Instruction) -> Step:
    registers, address = elements(ins.operands[0]), addresser(layout, ins.operands[1])
    (count, transposed), targets = _matrices(ins, registers), [layout.write(name, "b32") for name in registers]

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        warps = _acting_warps(mask, block)
        rows = address(block).reshape(-1, WARP)[warps, : 8 * count]  # lane 8 j + r has the address of row r of j
        threads = np.repeat(warps * WARP, 8 * count)
        words = block.shared.load(rows.reshape(-1), 16, threads, ins)
        matrices = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # two columns of a row together
        for number, target in enumerate(targets):
            view = block.views[target].reshape(-1, WARP)
            view[warps] = pairs[:, number].reshape(len(warps), WARP)

    return step


@makes("stmatrix", "sync aligned m8n8 trans shared shared::cta x1 x2 x4")
def stmatrix(layout: Layout, ins: Instruction) -> Step:
    registers, address = elements(ins.operands[1]), addresser(layout, ins.operands[0])
    (count, transposed), sources = _matrices(ins, registers), [layout.read(name, "b32") for name in registers]

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        warps = _acting_warps(mask, block)
        rows = address(block).reshape(-1, WARP)[warps, : 8 * count]
        pairs = np.stack([block.views[source].reshape(-1, WARP)[warps] for source in sources], 1)
        matrices = pairs.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        words = matrices.reshape(-1).view(WORDS[16])
        block.shared.store(rows.reshape(-1), words, np.repeat(warps * WARP, 8 * count), ins)

    return step
