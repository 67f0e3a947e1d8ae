"""One block of threads at work: numpy over its threads, which may part ways and meet again.

Threads at the same instruction go on together, those furthest behind first. A block gives way to others before every
atomic operation and every acquire, and now and then besides.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import arithmetic
import conversions
import matrices
import numpy as np
import traffic
import warps
from formats import Array, Fault, Mask, Unsupported
from instructions import Step, step_of
from program import Instruction, Program
from registers import File, Layout
from storage import GlobalView, Shared

MODULES = (arithmetic, conversions, traffic, warps, matrices)  # imported for the instructions that they make
TURN = 0.02  # the chance that a block gives way after a segment
ENDS = ("bra", "brx", "ret", "exit", "bar", "barrier")
Leave = Callable[["Block", Mask], list[tuple[int, Mask]]]


@dataclass(frozen=True)
class Segment:
    """Instructions that are run in one go."""

    steps: list[Step]
    length: int
    leave: Leave
    gives_way: bool
    waits: bool  # ends at a barrier


@dataclass(frozen=True)
class Code:
    """A translated program."""

    program: Program
    layout: Layout
    segments: dict[int, Segment]
    plan: list[tuple[int, int, np.dtype, int, int]]
    constants: dict[int, Array]
    places: list[tuple[int, str, np.dtype]]

    def registers(self, specials: Mapping[str, Array]) -> File:
        """Those of a new block."""
        places = {number: specials[name].astype(dtype) for number, name, dtype in self.places}
        return File(self.layout, self.plan, self.constants | places)


def translate(program: Program) -> Code:
    """Every instruction as a function. An instruction that is not known is an error here, run or not."""
    layout, instructions = Layout(program), program.instructions
    starts = {0, *program.labels.values()}
    for number, ins in enumerate(instructions):
        if ins.opcode in ENDS:
            starts.add(number + 1)
        if _gives_way(ins):
            starts.add(number)
    bounds = sorted(starts | {len(instructions)})
    segments = {}
    for start, end in itertools.pairwise(bounds):
        last = instructions[end - 1]
        ends = last.opcode in ENDS
        steps = [step_of(layout, ins) for ins in instructions[start : end - ends]]
        leave = _leaver(layout, last, end) if ends else lambda block, mask, end=end: [(end, mask)]
        waits = last.opcode.startswith("bar")
        segments[start] = Segment(steps, end - start, leave, _gives_way(instructions[start]), waits)
    return Code(program, layout, segments, layout.plan(), layout.constant_arrays(), layout.special_views())


def _gives_way(ins: Instruction) -> bool:
    return ins.opcode == "atom" or traffic.is_acquire(ins)


def _leaver(layout: Layout, ins: Instruction, behind: int) -> Leave:
    program = layout.program
    if ins.opcode in ("bar", "barrier"):
        plain = "sync" in ins.modifiers and ins.operands in (("0",), ("0", str(program.threads)))
        if not plain or ins.guard or "cluster" in ins.modifiers:
            raise Unsupported(f"{ins}: a barrier of the whole block is wanted")
        return lambda block, mask: [(behind, mask)]
    if ins.opcode in ("ret", "exit"):
        if ins.guard:
            raise Unsupported(f"{ins}: a guarded exit is not emulated")
        return lambda block, mask: []
    if ins.opcode == "brx":
        index, table = layout.read(ins.operands[0], "u32"), program.tables[ins.operands[1]]
        targets = [program.labels[label] for label in table]

        def by_index(block: Block, mask: Mask) -> list[tuple[int, Mask]]:
            values = block.views[index]
            return [
                (targets[value], mask & (values == value)) for value in np.unique(values[block.threads[mask]]).tolist()
            ]

        return by_index
    target = program.labels[ins.operands[0]]
    if not ins.guard:
        return lambda block, mask: [(target, mask)]
    guard, negated = layout.read(ins.guard, "pred"), ins.negated

    def branch(block: Block, mask: Mask) -> list[tuple[int, Mask]]:
        taken = block.views[guard] != negated
        if mask is not True:
            taken &= mask
        count, of = np.count_nonzero(taken), len(taken) if mask is True else np.count_nonzero(mask)
        if count in (0, of):
            return [(target if count else behind, mask)]
        return [(target, taken), (behind, mask & ~taken)]

    return branch


class Block:
    """State of one block. ``run`` yields where other blocks may go on."""

    def __init__(
        self,
        code: Code,
        parameters: Mapping[str, int],
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        shared: Shared,
        view: GlobalView,
        chance: random.Random,
    ) -> None:
        self.code, self.program, self.parameters = code, code.program, parameters
        self.shared, self.globals, self.chance = shared, view, chance
        self.threads = np.arange(self.program.threads)
        registers = code.registers(specials(self.threads, place, grid))
        self.views, self.words = registers.views, registers.words
        self.copies: list[Callable[[], None]] = []  # asynchronous, not yet of a group
        self.groups: list[list[Callable[[], None]]] = []
        self.instructions = self.barriers = 0

    def run(self) -> Iterator[None]:
        ready: dict[int, Mask] = {0: True}
        waiting: dict[int, Mask] = {}
        while ready or waiting:
            if not ready:
                if len(waiting) > 1:
                    self.shared.races.add(f"{self.program.name}: threads of a block meet at different barriers")
                self.barriers += 1
                self.shared.pass_barrier()
                self.globals.pass_barrier()
                ready, waiting = waiting, {}
            at = min(ready)
            mask = ready.pop(at)
            segment = self.code.segments.get(at)
            if segment is None:
                raise Fault(f"{self.program.name}: the program runs past its end")
            if segment.gives_way:
                yield
            for step in segment.steps:
                step(self, mask)
            self.instructions += segment.length
            group = waiting if segment.waits else ready
            for target, part in segment.leave(self, mask):
                group[target] = _together(group.get(target), part)
            if self.chance.random() < TURN:
                yield

    def commit_copies(self, threads: Array) -> None:
        self._all_together(threads)
        self.groups.append(self.copies)
        self.copies = []

    def wait_for_copies(self, threads: Array, allowed: int) -> None:
        self._all_together(threads)
        while len(self.groups) > allowed:
            for arrive in self.groups.pop(0):
                arrive()

    def _all_together(self, threads: Array) -> None:
        if len(threads) != len(self.threads):
            raise Unsupported(f"{self.program.name}: groups of asynchronous copies of a part of the block")


def _together(one: Mask, other: Mask) -> Mask:
    if one is None or other is True:
        return other
    both = one | other
    return True if both is True or both.all() else both


def specials(threads: Array, place: tuple[int, int, int], grid: tuple[int, int, int]) -> dict[str, Array]:
    """The registers that say where a thread is."""
    found = {"%tid.x": threads, "%laneid": threads % 32, "%warpid": threads // 32}
    for axis, letter in enumerate("xyz"):
        for name, number in (("ctaid", place[axis]), ("nctaid", grid[axis])):
            found[f"%{name}.{letter}"] = np.full(len(threads), number)
        found[f"%ntid.{letter}"] = np.full(len(threads), 1 if axis else len(threads))
        found.setdefault(f"%tid.{letter}", np.zeros(len(threads), np.int64))
    return {name: values.astype(np.uint32) for name, values in found.items()}
