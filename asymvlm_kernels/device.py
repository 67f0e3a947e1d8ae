"""Arithmetic that kernels of every phase share: products whose rounding is the same wherever they run, conversions and
reductions that cost a GPU less than the language's own.

Each has a form for Triton's interpreter, which lacks inline assembly, multiplies the raw bits of bf16 and reduces by a
function of ours one number at a time.
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

    @triton.jit
    def multiply_f32(a, b):
        return a * b

    @triton.jit
    def widened(numbers):
        return numbers.to(tl.float32)

    @triton.jit
    def narrowed(wide, dtype: tl.constexpr):
        return wide.to(dtype)

    @triton.jit
    def prefetch(pointers):
        pass

    @triton.jit
    def sum_both(a, b):
        return tl.sum(a, 0), tl.sum(b, 0)

    @triton.jit
    def min_both(a, b):
        return tl.min(a, 0), tl.min(b, 0)

    @triton.jit
    def max_and_min(a, b):
        return tl.max(a, 0), tl.min(b, 0)

    @triton.jit
    def max_or_nan(a):
        unknown = tl.max((a != a).to(tl.int32), 0) > 0
        return tl.where(unknown, float("nan"), tl.max(a, 0))

else:

    @triton.jit
    def multiply(a, b, sums):
        """``sums + a @ b`` in fp32."""
        return tl.dot(a, b, sums, input_precision="ieee")

    @triton.jit
    def multiply_f64(a, b):
        """A product that no compiler fuses with the sum behind it: PyTorch rounds twice."""
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, is_pure=True, pack=1)

    @triton.jit
    def multiply_f32(a, b):
        """`multiply_f64` for fp32."""
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def widened(numbers):
        """fp32 from a narrower type. (bf16 in two instructions a pair, where the compiler takes three.)"""
        if numbers.dtype == tl.bfloat16:
            wide = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
                "=&r,=r,r",
                [numbers],
                tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            wide = numbers.to(tl.float32)
        return wide

    @triton.jit
    def narrowed(wide, dtype: tl.constexpr):
        """bf16 or fp16 from fp32, two at a time: one conversion takes as long as four of a pair."""
        if dtype == tl.bfloat16:
            half = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [wide], tl.bfloat16, is_pure=True, pack=2
            )
        else:
            half = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [wide], tl.float16, is_pure=True, pack=2
            )
        return half

    @triton.jit
    def prefetch(pointers):
        """Ask for the cache lines at ``pointers``, which must be readable, and wait for nothing."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def _smaller(a, b, c, d):
        return tl.minimum(a, c), tl.minimum(b, d)

    @triton.jit
    def _wider(a, b, c, d):
        return tl.maximum(a, c), tl.minimum(b, d)

    @triton.jit
    def sum_both(a, b):
        """Sums along the first axis of two int32 arrays, in one reduction, which adds a warp in one instruction."""
        return tl.split(tl.sum(tl.join(a, b), 0))

    @triton.jit
    def min_both(a, b):
        """Minima along the first axis of two arrays, in one reduction."""
        return tl.reduce((a, b), 0, _smaller)

    @triton.jit
    def max_and_min(a, b):
        """The maximum of one array and the minimum of another, in one reduction."""
        return tl.reduce((a, b), 0, _wider)

    @triton.jit
    def max_or_nan(a):
        """Maximum along the first axis; NaN where one is NaN, which the language's own drops."""
        return tl.reduce(a, 0, larger_or_nan)


@triton.jit
def larger_or_nan(a, b):
    """The larger of two; NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def halves_of(wide, dtype: tl.constexpr):
    """``high`` and ``low`` of ``dtype``: the sum is fp32 ``wide`` but for its last bits; of infinity ``low`` is NaN."""
    high = narrowed(wide, dtype)
    return high, narrowed(wide - widened(high), dtype)
