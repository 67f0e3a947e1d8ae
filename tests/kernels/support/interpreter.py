"""What the tests change in Triton's interpreter: the order of sums in ``tl.dot``, the rounding of bf16, and its speed.

The interpreter multiplies by `numpy.matmul`, hence by whatever BLAS has for this CPU. OpenBLAS without AVX-512 sums the
last rows of a tile in another order than the first: a kernel would seem to depend on the batch where a GPU does not.
It cuts fp32 off to bf16 where a GPU rounds to the nearest: bf16 scores would seem to err by 1.2e-5.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
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


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16, of the even one of two; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), bits >> np.uint32(16) | np.uint32(0x40), nearest).astype(np.uint16)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> the bits of fp32."""
    return bits.view(np.uint16).astype(np.uint32) << np.uint32(16)


class PatchOnce:
    """In place of ``interpreter._patch_lang``, which a launch calls, and again each call of a device function.

    Within a launch the second time finds everything as it should be, and took a quarter of the time of a kernel.
    """

    def __init__(self, patch_lang: Callable[[Any], Any], scope: type) -> None:
        self.patch_lang, self.scope = patch_lang, scope
        self.modules: dict[Any, tuple[str, ...]] = {}  # of Triton's language that a function sees
        self.patched: set[tuple[str, ...]] = set()

    def __call__(self, fn: Any) -> Any:
        """A scope whose ``restore`` ends the launch, or does nothing for what was patched before."""
        if fn not in self.modules:
            seen = (value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value))
            self.modules[fn] = tuple(sorted({name for name in seen if name.startswith("triton.language")}))
        if self.modules[fn] in self.patched:
            return self.scope()
        self.patched.add(self.modules[fn])
        scope = self.patch_lang(fn)
        restore = scope.restore

        def end() -> None:
            restore()
            self.patched.clear()

        scope.restore = end
        return scope


def install(patch: pytest.MonkeyPatch) -> None:
    """Before any kernel runs. What is no arithmetic is done once: the names of the builtins are listed here, a launch
    patches the language once, and sums of integers are not computed twice for a check that only debugging reads."""
    import triton.language as tl
    from triton.language import core, math, tensor
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    owners = (tl, core, tensor, math, core.tensor_descriptor_base)
    builtins = {owner: [name for name in dir(owner) if core.is_builtin(getattr(owner, name))] for owner in owners}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        for name in builtins[owner] if owner in builtins else dir(owner):
            member = getattr(owner, name)
            if core.is_builtin(member):  # not patched yet
                interpreter._patch_attr(owner, name, member, builder, scope)

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
    patch.setattr(interpreter, "_patch_lang", PatchOnce(interpreter._patch_lang, interpreter._LangPatchScope))
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    convert_other = interpreter._convert_float

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and (source, target) == (tl.float32, tl.bfloat16):
            return round_to_bf16(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen_bf16(values)
        return convert_other(values, source, target, rounding_mode)

    patch.setattr(interpreter, "_convert_float", convert_float)
    name_to_dtype: dict[str, Any] = {}
    find_dtype = interpreter._get_np_dtype

    def get_np_dtype(of: Any) -> Any:
        found = name_to_dtype.get(of.name)
        return found if found is not None else name_to_dtype.setdefault(of.name, find_dtype(of))

    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
