"""A launch: the blocks of a grid in a drawn order, some of them at a time, and what they did."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from block import Block, Code
from formats import Fault
from storage import GlobalView, Shared, StrongView, Tensors
from weak import WeakView

DRAIN = 0.02  # the chance that stores of a block become visible by themselves, a turn
PATIENCE = 2_000_000  # turns before a launch is said to hang


@dataclass(frozen=True)
class Conditions:
    """How a grid is run. ``resident`` blocks are at work at once; ``weak``: see `weak`."""

    seed: int = 0
    resident: int = 6
    weak: bool = False
    patience: int = PATIENCE


PLAIN = Conditions()


@dataclass
class Report:
    """What a launch did. ``longest``: instructions and barriers of the block that ran most instructions."""

    name: str
    grid: tuple[int, int, int]
    instructions: int = 0
    longest: tuple[int, int] = (0, 0)
    races: set[str] = field(default_factory=set)
    bytes_read: dict[int, int] = field(default_factory=dict)  # from global memory, by the start of the storage


def launch(
    code: Code,
    tensors: Tensors,
    values: Iterable[int],
    grid: tuple[int, int, int],
    shared: int,
    conditions: Conditions = PLAIN,
) -> Report:
    """Run a grid to its end. ``values``: the parameters in order; ``shared``: bytes of shared memory."""
    parameters = dict(zip(code.program.parameters, values))
    chance = random.Random(conditions.seed)
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    chance.shuffle(places)
    report, views = Report(code.program.name, grid), list[GlobalView]()
    running: list[tuple[Block, Iterator[None]]] = []
    turns = 0
    with np.errstate(all="ignore"):
        while places or running:
            while places and len(running) < conditions.resident:
                view: GlobalView = WeakView(tensors, chance) if conditions.weak else StrongView(tensors)
                memory = Shared(shared, report.races)
                block = Block(code, parameters, places.pop(), grid, memory, view, chance)
                views.append(view)
                running.append((block, block.run()))
            block, steps = running[chance.randrange(len(running))]
            if _has_ended(steps):
                running.remove((block, steps))
                report.instructions += block.instructions
                report.longest = max(report.longest, (block.instructions, block.barriers))
            if conditions.weak and chance.random() < DRAIN:
                chance.choice(views).drain(0.3)
            turns += 1
            if turns > conditions.patience:
                raise Fault(f"{code.program.name}: no end after {turns} turns")
        for view in views:
            view.drain()
    report.bytes_read = {buffer.start: buffer.bytes_read for buffer in tensors.buffers}
    return report


def _has_ended(steps: Iterator[None]) -> bool:
    return next(steps, steps) is steps
