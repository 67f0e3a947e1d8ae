"""Decode attention with and without scores, and the hole-fill: ``make bench ARGS="-k 'attend and gemma'"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import DEVICE
from bench.ops.decode.cases import LONGEST
from bench.ops.decode.shapes import DecodeShape, decode_shapes_for

Compare = Callable[[str, Any, torch.dtype], None]
SHAPES = pytest.mark.parametrize("shape", decode_shapes_for(DEVICE), ids=lambda shape: shape.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@SHAPES
@DTYPES
def bench_attend(compare: Compare, shape: DecodeShape, dtype: torch.dtype) -> None:
    compare("attend", shape, dtype)


@SHAPES
@DTYPES
def bench_attend_scores(compare: Compare, shape: DecodeShape, dtype: torch.dtype) -> None:
    compare("attend_scores", shape, dtype)


@SHAPES
def bench_move_slots(compare: Compare, shape: DecodeShape) -> None:
    if shape.B * shape.S > LONGEST:
        pytest.skip("too much memory for all layers")
    compare("move_slots", shape, torch.bfloat16)
