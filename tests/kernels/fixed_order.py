"""A matrix product for Triton's interpreter that sums every element in one order, wherever it stands in its tile.

The interpreter multiplies by `numpy.matmul`, hence by whatever BLAS has for this CPU, and OpenBLAS without AVX-512 sums
the last rows of a tile in another order than the first: a kernel would seem to depend on the batch where a GPU does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` of ``(M, K)`` and ``(K, N)``: each element is one loop of NumPy's over K numbers that lie side by side."""
    return np.einsum("mk,nk->mn", np.ascontiguousarray(a), np.ascontiguousarray(b.T), optimize=False)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """In place of ``InterpreterBuilder.create_dot``. The kernels hand it fp32 only (see `fold.multiply`)."""
    found = {x.data.dtype.name for x in (a, b, d)}
    assert found == {"float32"}, f"tl.dot in the interpreter wants float32, got {found}"
    return type(d)(product(a.data, b.data) + d.data, d.dtype.scalar)
