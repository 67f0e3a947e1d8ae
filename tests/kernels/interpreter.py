"""What the tests change in Triton's interpreter: the order of sums in ``tl.dot``, and a search that took half its time.

The interpreter multiplies by `numpy.matmul`, hence by whatever BLAS has for this CPU. OpenBLAS without AVX-512 sums the
last rows of a tile in another order than the first: a kernel would seem to depend on the batch where a GPU does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` of ``(M, K)`` and ``(K, N)``: every element is one loop of NumPy's over K adjacent numbers."""
    return np.einsum("mk,nk->mn", np.ascontiguousarray(a), np.ascontiguousarray(b.T), optimize=False)


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """In place of ``InterpreterBuilder.create_dot``. The kernels hand it fp32 only (see `fold.multiply`)."""
    found = {x.data.dtype.name for x in (a, b, d)}
    assert found == {"float32"}, f"tl.dot in the interpreter wants float32, got {found}"
    return type(d)(product(a.data, b.data) + d.data, d.dtype.scalar)


def install(patch: pytest.MonkeyPatch) -> None:
    """Before any kernel runs: the names of the builtins are listed here once, not at each call of a device function."""
    import triton.language as tl
    from triton.language import core, math, tensor
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    owners = (tl, core, tensor, math, core.tensor_descriptor_base)
    builtins = {owner: [name for name in dir(owner) if core.is_builtin(getattr(owner, name))] for owner in owners}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        for name in builtins[owner]:
            member = getattr(owner, name)
            if core.is_builtin(member):  # not patched yet
                interpreter._patch_attr(owner, name, member, builder, scope)

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
