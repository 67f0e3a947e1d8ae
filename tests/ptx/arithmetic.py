"""Arithmetic and comparison, thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from formats import TYPES, Array, Mask, Unsupported, widened
from instructions import Maker, Step, makes, put
from program import Instruction
from registers import Layout

if TYPE_CHECKING:
    from block import Block

Function = Callable[..., Array]
SMALLEST = np.finfo(np.float32).tiny


def flush(values: Array) -> None:
    """.ftz: subnormal numbers become zero."""
    values[np.abs(values) < SMALLEST] = 0


def computed(layout: Layout, ins: Instruction, function: Function, kinds: list[str], result: str = "") -> Step:
    """A step that hands operands of ``kinds`` to a function of arrays."""
    sources = [layout.read(operand, kind) for operand, kind in zip(ins.operands[1:], kinds, strict=True)]
    target, flushes = layout.write(ins.operands[0], result or kinds[0]), "ftz" in ins.modifiers

    def step(block: Block, mask: Mask) -> None:
        views = block.views
        values = function(*[views[source] for source in sources])
        if flushes:
            flush(values)
        put(views[target], values, mask)

    return step


def direct(layout: Layout, ins: Instruction, ufunc: Any, kind: str) -> Step:
    """A step that is one ufunc of two operands, without a temporary."""
    left, right = (layout.read(operand, kind) for operand in ins.operands[1:])
    target = layout.write(ins.operands[0], kind)

    def step(block: Block, mask: Mask) -> None:
        views = block.views
        ufunc(views[left], views[right], out=views[target], where=mask)

    return step


def is_float(kind: str) -> bool:
    if kind in ("bf16", "f16", "f16x2", "bf16x2", "f32x2"):
        raise Unsupported(f"arithmetic of {kind} is not emulated")
    return kind.startswith("f")


@makes("add", "rn ftz")
def add(layout: Layout, ins: Instruction) -> Step:
    return _float_or_direct(layout, ins, np.add)


@makes("sub", "rn ftz")
def sub(layout: Layout, ins: Instruction) -> Step:
    return _float_or_direct(layout, ins, np.subtract)


def _float_or_direct(layout: Layout, ins: Instruction, ufunc: Any) -> Step:
    if is_float(ins.kind) and "ftz" in ins.modifiers:
        return computed(layout, ins, ufunc, [ins.kind] * 2)
    return direct(layout, ins, ufunc, ins.kind)


def high_half(kind: str) -> Function:
    if kind in ("s32", "u32"):
        wide = TYPES[widened(kind)]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(TYPES[kind])

    def exact(a: Array, b: Array) -> Array:
        products = [(x * y >> 64) & (2**64 - 1) for x, y in zip(a.tolist(), b.tolist())]
        return np.array(products, np.uint64).view(TYPES[kind])

    return exact


@makes("mul", "lo hi wide rn ftz")
def mul(layout: Layout, ins: Instruction) -> Step:
    kind = ins.kind
    if "hi" in ins.modifiers:
        return computed(layout, ins, high_half(kind), [kind] * 2)
    if "wide" in ins.modifiers:
        wide = TYPES[widened(kind)]
        return computed(layout, ins, lambda a, b: a.astype(wide) * b, [kind] * 2, widened(kind))
    return _float_or_direct(layout, ins, np.multiply)


@makes("mad", "lo wide")
def mad(layout: Layout, ins: Instruction) -> Step:
    kind, wide = ins.kind, widened(ins.kind) if "wide" in ins.modifiers else ins.kind
    dtype = TYPES[wide]
    return computed(layout, ins, lambda a, b, c: a.astype(dtype) * b + c, [kind, kind, wide], wide)


@makes("fma", "rn ftz")
def fma(layout: Layout, ins: Instruction) -> Step:
    if not is_float(ins.kind):
        raise Unsupported(f"{ins}: f32 or f64 is wanted")
    dtype, exact = TYPES[ins.kind], np.float64 if ins.kind == "f32" else np.longdouble

    def rounded_once(a: Array, b: Array, c: Array) -> Array:
        wide = np.multiply(a, b, dtype=exact)
        wide += c
        return wide.astype(dtype)

    return computed(layout, ins, rounded_once, [ins.kind] * 3)


def divide(a: Array, b: Array) -> Array:
    """As C does, towards zero."""
    if a.dtype.kind != "i":
        return a // b
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    size = (np.abs(a).view(unsigned) // np.abs(b).view(unsigned)).view(a.dtype)
    return np.where((a < 0) ^ (b < 0), -size, size)


@makes("div", "rn full approx ftz")
def div(layout: Layout, ins: Instruction) -> Step:
    return computed(layout, ins, np.divide if is_float(ins.kind) else divide, [ins.kind] * 2)


@makes("rem")
def rem(layout: Layout, ins: Instruction) -> Step:
    return computed(layout, ins, lambda a, b: a - divide(a, b) * b, [ins.kind] * 2)


@makes("min", "NaN relu ftz")
def minimum(layout: Layout, ins: Instruction) -> Step:
    return _extreme(layout, ins, np.minimum, np.fmin)


@makes("max", "NaN relu ftz")
def maximum(layout: Layout, ins: Instruction) -> Step:
    return _extreme(layout, ins, np.maximum, np.fmax)


def _extreme(layout: Layout, ins: Instruction, ufunc: Any, of_numbers: Any) -> Step:
    chosen = of_numbers if is_float(ins.kind) and "NaN" not in ins.modifiers else ufunc
    if "relu" in ins.modifiers:
        return computed(layout, ins, lambda a, b: np.maximum(chosen(a, b), a.dtype.type(0)), [ins.kind] * 2)
    return direct(layout, ins, chosen, ins.kind)


def bitwise_maker(ufunc: Any) -> Maker:
    return lambda layout, ins: direct(layout, ins, ufunc, ins.kind)


def unary_maker(function: Function) -> Maker:
    return lambda layout, ins: computed(layout, ins, function, [ins.kind])


for name, bitwise in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    makes(name)(bitwise_maker(bitwise))

UNARY: dict[str, tuple[Function, str]] = {
    "not": (np.invert, ""),
    "neg": (np.negative, "ftz"),
    "abs": (np.abs, "ftz"),
    "sqrt": (np.sqrt, "rn approx ftz"),
    "rsqrt": (lambda a: 1 / np.sqrt(a), "approx ftz"),
    "rcp": (lambda a: 1 / a, "rn approx ftz"),
    "ex2": (np.exp2, "approx ftz"),
    "lg2": (np.log2, "approx ftz"),
    "tanh": (np.tanh, "approx"),
}
for name, (function, modifiers) in UNARY.items():
    makes(name, modifiers)(unary_maker(function))


@makes("popc")
def popc(layout: Layout, ins: Instruction) -> Step:
    return computed(layout, ins, np.bitwise_count, [ins.kind], "u32")


def shifted(shift: Any) -> Function:
    """By any number of bits: as many as the word has, or more, leave zero, or the sign."""

    def function(a: Array, n: Array) -> Array:
        bits = 8 * a.itemsize
        moved = shift(a, np.minimum(n, bits - 1).astype(a.dtype))
        return moved if shift is np.right_shift and a.dtype.kind == "i" else np.where(n < bits, moved, 0)

    return function


@makes("shl")
def shl(layout: Layout, ins: Instruction) -> Step:
    return computed(layout, ins, shifted(np.left_shift), [ins.kind, "u32"])


@makes("shr")
def shr(layout: Layout, ins: Instruction) -> Step:
    return computed(layout, ins, shifted(np.right_shift), [ins.kind, "u32"])


@makes("bfe")
def bfe(layout: Layout, ins: Instruction) -> Step:
    signed = ins.kind[0] == "s"

    def field(a: Array, start: Array, size: Array) -> Array:
        n = (size & 0xFF).astype(np.int64)
        value = (a.astype(np.int64) >> np.minimum(start & 0xFF, 63).astype(np.int64)) & ((1 << n) - 1)
        return np.where(signed & (n > 0) & (value >> np.maximum(n - 1, 0) & 1 == 1), value - (1 << n), value)

    if ins.kind not in ("s32", "u32"):
        raise Unsupported(f"{ins}: a word of 32 bits is wanted")
    return computed(layout, ins, field, [ins.kind, "u32", "u32"])


@makes("prmt")
def prmt(layout: Layout, ins: Instruction) -> Step:
    def permuted(a: Array, b: Array, selector: Array) -> Array:
        octets = np.stack([a, b], 1).view(np.uint8)
        nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        found = np.take_along_axis(octets, (nibbles & 7).astype(np.int64), 1)
        found = np.where(nibbles & 8, np.where(found & 0x80, 0xFF, 0), found).astype(np.uint8)
        return np.ascontiguousarray(found).view(np.uint32).reshape(-1)

    return computed(layout, ins, permuted, ["b32"] * 3)


@makes("selp")
def selp(layout: Layout, ins: Instruction) -> Step:
    kind = f"b{ins.kind[1:]}"

    def selected(a: Array, b: Array, p: Array) -> Array:
        return np.where(p, a, b)

    return computed(layout, ins, selected, [kind, kind, "pred"])


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


@makes("setp", f"ne ftz {' '.join(COMPARE)}")
def setp(layout: Layout, ins: Instruction) -> Step:
    name = ins.modifiers[0]
    if name != "ne":
        compare = COMPARE[name]
    elif is_float(ins.kind):
        compare = lambda a, b: (a < b) | (a > b)  # noqa: E731  # false for NaN
    else:
        compare = np.not_equal
    return computed(layout, ins, compare, [ins.kind] * 2, "pred")
