"""The ops of other methods: ``make bench ARGS="-k 'methods and next'"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import DEVICE
from bench.ops.methods.cases import METHOD_CASES
from bench.ops.methods.shapes import MethodShape, method_shapes_for

Compare = Callable[[str, Any, torch.dtype], None]


@pytest.mark.parametrize("shape", method_shapes_for(DEVICE), ids=lambda shape: shape.name)
@pytest.mark.parametrize("op", METHOD_CASES)
def bench_methods(compare: Compare, op: str, shape: MethodShape) -> None:
    compare(op, shape, torch.bfloat16)
