"""Score, select, gather and prune at the sizes of real models: ``make bench ARGS="-k 'score and phi'"``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.conftest import DEVICE
from bench.ops.prefill.shapes import Shape, shapes_for

Compare = Callable[[str, Shape, torch.dtype], None]
SHAPES = pytest.mark.parametrize("shape", shapes_for(DEVICE), ids=lambda shape: shape.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@SHAPES
@DTYPES
def bench_score_tokens(compare: Compare, shape: Shape, dtype: torch.dtype) -> None:
    compare("score_tokens", shape, dtype)


@SHAPES
def bench_select_tokens(compare: Compare, shape: Shape) -> None:
    compare("select_tokens", shape, torch.float32)


@SHAPES
@DTYPES
def bench_gather_rows(compare: Compare, shape: Shape, dtype: torch.dtype) -> None:
    compare("gather_rows", shape, dtype)


@SHAPES
@DTYPES
def bench_prune_sequence(compare: Compare, shape: Shape, dtype: torch.dtype) -> None:
    compare("prune_sequence", shape, dtype)
