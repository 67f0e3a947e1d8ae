"""Conversions between types, and moves that pack words or take them apart, thread by thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from arithmetic import computed
from formats import TYPES, Array, Mask, Unsupported, bf16_of_float, float_of_bf16
from instructions import Step, makes, put
from program import Instruction, elements
from registers import Layout

if TYPE_CHECKING:
    from block import Block


@makes("cvt", "rn rzi rni rz sat ftz")
def cvt(layout: Layout, ins: Instruction) -> Step:
    if "sat" in ins.modifiers:
        raise Unsupported(f"{ins}: .sat is not emulated")
    target, source = ins.modifiers[-2:]
    if target in ("bf16x2", "f16x2"):  # the first operand is the upper half
        narrow = bf16_of_float if target == "bf16x2" else (lambda a: a.astype(np.float16).view(np.uint16))

        def packed(a: Array, b: Array) -> Array:
            return narrow(b).astype(np.uint32) | narrow(a).astype(np.uint32) << np.uint32(16)

        return computed(layout, ins, packed, [source] * 2, "b32")
    if target == "bf16" and source == "f32":
        return computed(layout, ins, bf16_of_float, [source], "bf16")
    if source == "bf16" and target == "f32":
        return computed(layout, ins, float_of_bf16, ["bf16"], target)
    if "bf16" in (target, source):
        raise Unsupported(f"{ins}: bf16 goes from and to fp32 only")
    dtype = TYPES[target]
    if TYPES[source].kind == "f" and dtype.kind in "iu":
        if not {"rzi", "rni"} & set(ins.modifiers):
            raise Unsupported(f"{ins}: this rounding is not emulated")
        rounded = np.trunc if "rzi" in ins.modifiers else np.rint
        low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)

        def to_integer(a: Array) -> Array:
            wide = np.nan_to_num(rounded(a.astype(np.float64)), nan=0.0)
            inside = np.clip(wide, low, high)
            limit = np.where(wide >= high, np.iinfo(dtype).max, 0).astype(dtype)
            return np.where(wide >= high, limit, np.where(wide >= high, 0, inside).astype(dtype))

        return computed(layout, ins, to_integer, [source], target)
    return computed(layout, ins, lambda a: a.astype(dtype), [source], target)


@makes("mov")
def mov(layout: Layout, ins: Instruction) -> Step:
    targets, sources = (elements(operand) for operand in ins.operands)
    parts = max(len(targets), len(sources))
    part = ins.kind if parts == 1 else f"b{int(ins.kind[1:]) // parts}"
    to = [layout.write(name, part, number * (len(targets) == 1), parts if len(targets) == 1 else 1)
          for number, name in enumerate(targets * (parts // len(targets)))]  # fmt: skip
    of = [layout.read(name, part, number * (len(sources) == 1), parts if len(sources) == 1 else 1)
          for number, name in enumerate(sources * (parts // len(sources)))]  # fmt: skip

    def step(block: Block, mask: Mask) -> None:
        views = block.views
        for target, source in zip(to, of):
            put(views[target], views[source], mask)

    return step
