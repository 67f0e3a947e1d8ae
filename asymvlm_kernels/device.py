"""Arithmetic that kernels of every phase share: products whose rounding is the same wherever they run.

Each has a form for Triton's interpreter, which lacks inline assembly and multiplies the raw bits of bf16.
"""

from __future__ import annotations

from asymvlm_kernels._triton import INTERPRETED, tl, triton

if INTERPRETED:

    @triton.jit
    def multiply(a, b, sums):
        """``sums + a @ b`` in fp32. (The interpreter would multiply the raw bits of bf16.)"""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")

    @triton.jit
    def multiply_f64(a, b):
        return a * b

else:

    @triton.jit
    def multiply(a, b, sums):
        """``sums + a @ b`` in fp32."""
        return tl.dot(a, b, sums, input_precision="ieee")

    @triton.jit
    def multiply_f64(a, b):
        """A product that no compiler fuses with the sum behind it: PyTorch rounds twice."""
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, is_pure=True, pack=1)
