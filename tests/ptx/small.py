"""Tiny kernels written by hand, for tests of the emulator itself: run on numpy arrays, without Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
from block import translate
from formats import Array
from grid import PLAIN, Conditions, Report, launch
from program import parse
from storage import Tensors

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tiny(
    .param .u64 .ptr .global .align 1 tiny_param_0,
    .param .u64 .ptr .global .align 1 tiny_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [tiny_param_0];
    ld.param.b64 %rd2, [tiny_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;  // this thread's word of the first array
    mad.wide.u32 %rd4, %r1, 4, %rd2;  // and of the second
"""


def aligned(values: Any, dtype: Any = None) -> Array:
    """A copy at an address that is a multiple of 16, as tensors have."""
    values = np.asarray(values, dtype)
    room = np.zeros(values.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    found = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


def run(
    body: str,
    first: Array,
    second: Array,
    *,
    threads: int = 64,
    blocks: int = 1,
    shared: int = 4096,
    conditions: Conditions = PLAIN,
) -> Report:
    """Run ``body`` between what every kernel here begins with and its end."""
    text = HEAD.format(threads=threads) + body + "\n    ret;\n}\n"
    tensors = Tensors()
    for name, array in (("first", first), ("second", second)):
        tensors.add(array.ctypes.data, array.nbytes, name)
    places = [array.ctypes.data for array in (first, second)]
    return launch(translate(parse(text)), tensors, places, (blocks, 1, 1), shared, conditions)
