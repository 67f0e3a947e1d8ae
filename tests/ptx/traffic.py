"""Loads, stores, atomic operations and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from formats import TYPES, WORDS, Array, Fault, Mask, Unsupported, bits_of
from instructions import Step, chosen, makes, put
from program import Instruction, elements
from registers import Layout

if TYPE_CHECKING:
    from block import Block

SPACES = "param global shared shared::cta"
ORDER = "relaxed acquire release acq_rel weak volatile gpu cta sys"
HINTS = "ca cg cs lu nc L1::evict_last L1::evict_first L1::no_allocate L2::evict_last L2::evict_first L2::cache_hint"
VECTORS = {"v2": 2, "v4": 4}


def is_acquire(ins: Instruction) -> bool:
    return bool({"acquire", "acq_rel"} & set(ins.modifiers))


def is_release(ins: Instruction) -> bool:
    return bool({"release", "acq_rel"} & set(ins.modifiers))


def is_shared(ins: Instruction) -> bool:
    return any(modifier.startswith("shared") for modifier in ins.modifiers)


def word_of(ins: Instruction) -> tuple[int, int]:
    """Numbers that one thread moves, and their bytes together."""
    count = next((VECTORS[modifier] for modifier in ins.modifiers if modifier in VECTORS), 1)
    size = count * TYPES[ins.kind].itemsize
    if size not in WORDS:
        raise Unsupported(f"{ins}: an access of {size} bytes")
    if not is_shared(ins) and "global" not in ins.modifiers:
        raise Unsupported(f"{ins}: global or shared memory is wanted")
    return count, size


def addresser(layout: Layout, operand: str) -> Callable[[Block], Array]:
    """The addresses of all threads."""
    base, offset = layout.address(operand)
    if base is None:
        return lambda block: np.full(block.program.threads, offset, np.int64)
    return lambda block: block.views[base].astype(np.int64) + offset


def at(addresses: Array, threads: Array, mask: Mask) -> Array:
    return addresses if mask is True else addresses[threads]


@makes("ld", f"{SPACES} {ORDER} {HINTS} {' '.join(VECTORS)}")
def ld(layout: Layout, ins: Instruction) -> Step:
    kind = ins.kind
    if "param" in ins.modifiers:
        target, name = layout.write(ins.operands[0], kind), ins.operands[1].strip("[]")
        return lambda block, mask: put(block.views[target], bits_of(block.parameters[name], kind), mask)
    (count, size), address, shared = word_of(ins), addresser(layout, ins.operands[1]), is_shared(ins)
    targets = [layout.write(register, kind) for register in elements(ins.operands[0])]
    fresh = bool({"cg", "acquire", "relaxed", "volatile"} & set(ins.modifiers))
    acquires, dtype = is_acquire(ins), TYPES[kind]

    def step(block: Block, mask: Mask) -> None:
        threads = chosen(mask, block)
        addresses = at(address(block), threads, mask)
        if shared:
            words = block.shared.load(addresses, size, threads, ins)
        else:
            words = block.globals.load(addresses.view(np.uint64), size, ins, cached=not fresh)
        numbers = words.view(dtype).reshape(-1, count)
        for number, target in enumerate(targets):
            block.views[target][... if mask is True else threads] = numbers[:, number]
        if acquires:
            block.globals.acquire()

    return step


@makes("st", f"{SPACES} {ORDER} {HINTS} {' '.join(VECTORS)}")
def st(layout: Layout, ins: Instruction) -> Step:
    (count, size), address, shared = word_of(ins), addresser(layout, ins.operands[0]), is_shared(ins)
    sources = [layout.read(register, ins.kind) for register in elements(ins.operands[1])]
    strong, dtype = bool({"relaxed", "release", "volatile"} & set(ins.modifiers)), TYPES[ins.kind]

    def step(block: Block, mask: Mask) -> None:
        threads = chosen(mask, block)
        addresses = at(address(block), threads, mask)
        numbers = np.empty((len(threads), count), dtype)
        for number, source in enumerate(sources):
            numbers[:, number] = at(block.views[source], threads, mask)
        words = numbers.reshape(-1).view(WORDS[size])
        if shared:
            block.shared.store(addresses, words, threads, ins)
            return
        if is_release(ins):
            block.globals.release(threads)
        block.globals.store(addresses.view(np.uint64), words, threads, ins)
        if strong:
            block.globals.settle(addresses.view(np.uint64), size, ins)

    return step


@makes("prefetch", "global L1 L2")
def prefetch(layout: Layout, ins: Instruction) -> Step:
    """Nothing but the check that something lies there."""
    address = addresser(layout, ins.operands[0])

    def step(block: Block, mask: Mask) -> None:
        addresses = at(address(block), chosen(mask, block), mask).view(np.uint64)
        for _ in block.globals.tensors.place(addresses, 1, ins):
            pass

    return step


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, x: old + x,
    "exch": lambda old, x: x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
}


@makes("atom", f"global {ORDER} {' '.join(OPERATIONS)}")
def atom(layout: Layout, ins: Instruction) -> Step:
    return _atomic(layout, ins, ins.operands[1:], layout.write(ins.operands[0], ins.kind))


@makes("red", f"global {ORDER} {' '.join(OPERATIONS)}")
def red(layout: Layout, ins: Instruction) -> Step:
    return _atomic(layout, ins, ins.operands, None)


def _atomic(layout: Layout, ins: Instruction, operands: tuple[str, ...], target: int | None) -> Step:
    if "global" not in ins.modifiers:
        raise Unsupported(f"{ins}: global memory is wanted")
    operation = next(function for name, function in OPERATIONS.items() if name in ins.modifiers)
    address, source, dtype = addresser(layout, operands[0]), layout.read(operands[1], ins.kind), TYPES[ins.kind]

    def step(block: Block, mask: Mask) -> None:
        threads, view = chosen(mask, block), block.globals
        addresses = at(address(block), threads, mask).view(np.uint64)
        if is_release(ins):
            view.release(threads)
        view.settle(addresses, dtype.itemsize, ins)
        given, old = at(block.views[source], threads, mask), np.empty(len(threads), dtype)
        for where, buffer, places in view.tensors.place(addresses, dtype.itemsize, ins):
            memory, numbers = buffer.words(dtype.itemsize).view(dtype), np.arange(len(threads))[where]
            for number, place in zip(numbers.tolist(), places.tolist()):  # one thread after the other
                old[number] = memory[place]
                memory[place] = operation(memory[place], given[number])
        if target is not None:
            block.views[target][threads] = old
        if is_acquire(ins):
            view.acquire()

    return step


@makes("cp", "async ca cg shared shared::cta global commit_group wait_group wait_all L2::cache_hint L2::128B")
def cp(layout: Layout, ins: Instruction) -> Step:
    if "commit_group" in ins.modifiers:
        return lambda block, mask: block.commit_copies(chosen(mask, block))
    if "wait_group" in ins.modifiers or "wait_all" in ins.modifiers:
        allowed = int(ins.operands[0]) if ins.operands else 0
        return lambda block, mask: block.wait_for_copies(chosen(mask, block), allowed)
    target, source = addresser(layout, ins.operands[0]), addresser(layout, ins.operands[1])
    size, cached = int(ins.operands[2], 0), "ca" in ins.modifiers
    taken = layout.read(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def step(block: Block, mask: Mask) -> None:
        threads = chosen(mask, block)
        to, of = at(target(block), threads, mask), at(source(block), threads, mask).view(np.uint64)
        copied = np.full(len(threads), True) if taken is None else at(block.views[taken], threads, mask) > 0
        if taken is not None and np.any(copied & (at(block.views[taken], threads, mask) != size)):
            raise Fault(f"{ins}: a copy of a part of a word is not emulated")
        block.shared.claim(to, size, threads, ins)

        def arrive() -> None:
            words = np.zeros(len(threads), WORDS[size])
            if copied.any():
                words[copied] = block.globals.load(of[copied], size, ins, cached)
            block.shared.store(to, words, threads, ins)

        block.copies.append(arrive)

    return step


def nothing(layout: Layout, ins: Instruction) -> Step:
    return lambda block, mask: None


makes("griddepcontrol", "wait launch_dependents")(nothing)
makes("nanosleep")(nothing)


@makes("fence", "proxy async sc acq_rel gpu cta sys shared::cta mbarrier_init release cluster")
def fence(layout: Layout, ins: Instruction) -> Step:
    return nothing(layout, ins) if "proxy" in ins.modifiers or "cta" in ins.modifiers else membar(layout, ins)


@makes("membar", "gl sys cta")
def membar(layout: Layout, ins: Instruction) -> Step:
    def step(block: Block, mask: Mask) -> None:
        block.globals.release(chosen(mask, block))
        block.globals.acquire()

    return step
