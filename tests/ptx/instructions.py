"""How an instruction becomes a Python function: the table of opcodes, filled by the modules beside this one.

A maker is given the layout of the registers and the instruction, once, and returns a step: a function of the block and
the mask of threads that act. A modifier that a maker does not name is refused, so that nothing is emulated by half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from formats import TYPES, Array, Fault, Mask, Unsupported
from program import Instruction
from registers import Layout

if TYPE_CHECKING:
    from block import Block

Step = Callable[["Block", Mask], None]
Maker = Callable[[Layout, Instruction], Step]
MAKERS: dict[str, tuple[Maker, frozenset[str]]] = {}
WHY_NOT = {
    "tcgen05": "tensor memory (sm_100) is not emulated",
    "mbarrier": "asynchronous barriers are not emulated",
    "cp.async.bulk": "bulk copies (TMA) are not emulated",
    "tensormap": "tensor maps (TMA) are not emulated",
    "cp.reduce": "bulk copies (TMA) are not emulated",
    "mapa": "clusters of blocks are not emulated",
    "barrier.cluster": "clusters of blocks are not emulated",
    "clusterlaunchcontrol": "clusters of blocks are not emulated",
}


def makes(opcode: str, modifiers: str = "") -> Callable[[Maker], Maker]:
    """Registers a maker. ``modifiers``: those that it knows beside types and what it reads itself."""

    def register(maker: Maker) -> Maker:
        MAKERS[opcode] = maker, frozenset(modifiers.split())
        return maker

    return register


def step_of(layout: Layout, instruction: Instruction) -> Step:
    full = ".".join([instruction.opcode, *instruction.modifiers])
    for start, reason in WHY_NOT.items():
        if full.startswith(start):
            raise Unsupported(f"{full}: {reason}: {instruction}")
    if instruction.opcode not in MAKERS:
        raise Unsupported(f"{full}: unknown instruction: {instruction}")
    maker, modifiers = MAKERS[instruction.opcode]
    unknown = set(instruction.modifiers) - modifiers - TYPES.keys()
    if unknown:
        raise Unsupported(f"{full}: unknown modifier {', '.join(sorted(unknown))}: {instruction}")
    step = maker(layout, instruction)
    if not instruction.guard:
        return step
    guard, negated = layout.read(instruction.guard, "pred"), instruction.negated

    def guarded(block: Block, mask: Mask) -> None:
        acting = ~block.views[guard] if negated else block.views[guard]
        if mask is not True:
            acting = acting & mask
        count = np.count_nonzero(acting)
        if count:
            step(block, True if count == len(acting) else acting.copy())

    return guarded


def whole_warps(mask: Mask, why: Instruction, threads: int = 32) -> None:
    """A fault where only some threads of a warp, or of a warp group, act together."""
    if mask is not True:
        groups = mask.reshape(-1, threads)
        if np.any(groups.any(1) & ~groups.all(1)):
            raise Fault(f"{why}: only a part of {threads} threads that act together is here")


def chosen(mask: Mask, block: Block) -> Array:
    """The numbers of the threads that act."""
    return block.threads if mask is True else np.flatnonzero(mask)


def put(target: Array, values: Array, mask: Mask) -> None:
    np.copyto(target, values, where=mask, casting="unsafe")
