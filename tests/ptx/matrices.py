"""Matrix products of tensor cores: mma.sync of a warp, wgmma of four warps with operands in shared memory.

Where a thread holds which element is a fixed exchange of axes. A thread is warp w, row g of 8 and pair c of 4; a
register holds two halves h of 16 bits, or one fp32 number.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from formats import WARP, Array, Fault, Mask, Unsupported, float_of_half
from instructions import Step, makes, whole_warps
from program import Instruction, elements
from registers import Layout

if TYPE_CHECKING:
    from block import Block

GROUP = 4 * WARP  # threads of a warp group
HALVES = ("bf16", "f16")
WIDTH_OF_SWIZZLE = {1: 128, 2: 64, 3: 32}


def fragment_a(registers: Array, kind: str) -> Array:
    """(4, T) words as ``(warps, 16, 16)``: register 2 k + m is the m-th 8 rows and the k-th 8 columns."""
    halves = float_of_half(np.ascontiguousarray(registers).view(np.uint16), kind)
    return halves.reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def fragment_b(registers: Array, kind: str) -> Array:
    """(2, T) words as ``(warps, 16, 8)``: a thread's pair lies along k, its g is the column."""
    halves = float_of_half(np.ascontiguousarray(registers).view(np.uint16), kind)
    return halves.reshape(2, -1, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def sums_of(registers: Array) -> Array:
    """(4 n, T) fp32 sums as ``(warps, 16, 8 n)``."""
    count = len(registers) // 4
    return registers.reshape(count, 2, 2, -1, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * count)


def registers_of(sums: Array) -> Array:
    """The way back from `sums_of`."""
    count = sums.shape[2] // 8
    found = sums.reshape(-1, 2, 8, count, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(found).reshape(4 * count, -1)


def rows(layout: Layout, operand: str) -> Array:
    return np.array([layout.row(name) for name in elements(operand)])


def write_sums(block: Block, targets: Array, sums: Array, mask: Mask) -> None:
    found = registers_of(sums).view(np.uint32)
    if mask is True:
        block.words[targets] = found
    else:
        block.words[targets] = np.where(mask, found, block.words[targets])


@makes("mma", "sync aligned m16n8k16 row col")
def mma(layout: Layout, ins: Instruction) -> Step:
    result, kind, other, added = ins.modifiers[-4:]
    if (result, added) != ("f32", "f32") or kind not in HALVES or kind != other or "m16n8k16" not in ins.modifiers:
        raise Unsupported(f"{ins}: m16n8k16 of bf16 or f16 with fp32 sums is wanted")
    d, a, b, c = (rows(layout, operand) for operand in ins.operands)

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins)
        words = block.words
        sums = sums_of(words[c].view(np.float32)) + fragment_a(words[a], kind) @ fragment_b(words[b], kind)
        write_sums(block, d, sums, mask)

    return step


def descriptor_addresses(descriptor: int, count: int, depth: int, along_rows: bool, why: Instruction) -> Array:
    """Addresses in shared memory of ``(count, depth)`` 16-bit numbers that a matrix descriptor describes.

    ``along_rows``: the first axis is contiguous, where usually it is the second, along k. Both come in tiles of 8 rows
    of ``width`` bytes, whose 16-byte pieces are swizzled by the row.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = WIDTH_OF_SWIZZLE.get(descriptor >> 62)
    if width is None:
        raise Unsupported(f"{why}: a descriptor without a swizzle, {descriptor:#x}")
    row, k = np.arange(count)[:, None], np.arange(depth)[None]
    if along_rows:
        per = width // 2
        found = start + row // per * leading + row % per * 2 + k // 8 * stride + k % 8 * width
    else:
        found = start + row // 8 * stride + row % 8 * width + k * 2
    return found ^ (((found >> 7) & (width // 16 - 1)) << 4)


SHAPES = " ".join(f"m64n{columns}k16" for columns in range(8, 257, 8))


@makes("wgmma", f"mma_async fence commit_group wait_group sync aligned {SHAPES}")
def wgmma(layout: Layout, ins: Instruction) -> Step:
    if "mma_async" not in ins.modifiers:
        return lambda block, mask: whole_warps(mask, ins, GROUP)
    found, kind = re.search(r"m64n(\d+)k16\.f32\.(bf16|f16)\.\2", ins.text), ins.kind
    if found is None or ins.operands[4:6] != ("1", "1"):
        raise Unsupported(f"{ins}: m64nNk16 of bf16 or f16 with fp32 sums and no negation is wanted")
    width, targets = int(found.group(1)), rows(layout, ins.operands[0])
    in_registers = ins.operands[1].startswith("{")
    transposed = ins.operands[6:]
    a_rows = rows(layout, ins.operands[1]) if in_registers else None
    a, b = None if in_registers else layout.read(ins.operands[1], "u64"), layout.read(ins.operands[2], "u64")
    adds, along_b = layout.read(ins.operands[3], "pred"), transposed[-1] == "1"
    along_a = not in_registers and transposed[0] == "1"

    def operand(block: Block, view: int | None, count: int, along: bool, group: int) -> Array:
        assert view is not None
        of_group = block.views[view][group * GROUP : (group + 1) * GROUP]
        if np.any(of_group != of_group[0]):
            raise Fault(f"{ins}: descriptors differ within a warp group")
        addresses = descriptor_addresses(int(of_group[0]), count, 16, along, ins)
        return float_of_half(block.shared.load_by_all(addresses, ins), kind)

    def step(block: Block, mask: Mask) -> None:
        whole_warps(mask, ins, GROUP)
        words, groups = block.words, len(block.threads) // GROUP
        sums = sums_of(words[targets].view(np.float32)).reshape(groups, 64, width)
        left = fragment_a(words[a_rows], kind).reshape(groups, 64, 16) if a_rows is not None else None
        acting = range(groups) if mask is True else np.flatnonzero(mask[::GROUP]).tolist()
        for group in acting:
            ours = left[group] if left is not None else operand(block, a, 64, along_a, group)
            product = ours @ operand(block, b, width, along_b, group).T
            sums[group] = sums[group] + product if block.views[adds][group * GROUP] else product
        write_sums(block, targets, sums.reshape(-1, 16, width), mask)

    return step
