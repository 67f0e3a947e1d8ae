"""Types of PTX as numpy reads them, and bf16, which numpy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = Any  # which threads of a block act: an array of bool, or True for all of them

WARP = 32
TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for names, kind in (
        ("pred", np.bool_),
        ("u8 b8", np.uint8),
        ("s8", np.int8),
        ("u16 b16 bf16", np.uint16),
        ("s16", np.int16),
        ("f16", np.float16),
        ("u32 b32 bf16x2 f16x2", np.uint32),
        ("s32", np.int32),
        ("f32", np.float32),
        ("u64 b64", np.uint64),
        ("s64", np.int64),
        ("f64", np.float64),
    )
    for name in names.split()
}
WORDS = {size: np.dtype(kind) for size, kind in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))}


class Fault(Exception):
    """What a GPU would not survive, or would survive with undefined results."""


class Unsupported(Exception):
    """An instruction that the emulator does not know. Says which."""


def widened(kind: str) -> str:
    """The type of twice the size: s64 for s32."""
    return f"{kind[0]}{2 * int(kind[1:])}"


def bits_of(number: int | float, kind: str) -> Any:
    """A number, or the bits of one as a positive or negative integer, as a numpy scalar of a type."""
    dtype = TYPES[kind]
    if dtype == np.bool_:
        return np.bool_(number != 0)
    if isinstance(number, float):
        return dtype.type(number)
    size = dtype.itemsize
    return np.array([number & (2 ** (8 * size) - 1)], f"u{size}").view(dtype)[0]


def float_of_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_of_float(x: Array) -> Array:
    """Rounded to nearest, ties to even; every NaN becomes the one that PTX makes."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    rounded[(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)] = 0x7FFF
    return rounded


def float_of_half(bits: Array, kind: str) -> Array:
    """bf16 or f16, given as uint16, in fp32."""
    return float_of_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)
