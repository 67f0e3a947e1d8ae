"""The text side of the score: ``t'_j = w * t_j / ||t_j||`` as a sum of two numbers of the dtype of V.

One bf16 t' would cost 6e-4 of score, enough to swap near ties; a sum of two (``high + low``) 2e-6 and twice the rows of
one matrix product. Both halves are rows of it, in turns of eight: so a thread of a tensor core instruction holds both
products of a text, and adds them without asking another.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.launch import empty, launch
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.tuning.prefill import ScoreConfig, fold_config, row_vector

TURN = constant(8)  # rows of `high`, then as many of `low`


@triton.jit
def in_turns(high, low, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of ``high`` and ``low``, eight of each in turn."""
    both = tl.permute(tl.reshape(tl.join(high, low), (BLOCK_L // TURN, TURN, BLOCK_D, 2)), (0, 3, 1, 2))
    return tl.reshape(both, (2 * BLOCK_L, BLOCK_D))


@triton.jit
def doubled(numbers, BLOCK_L: tl.constexpr):
    """One number a text as one number a row of `in_turns`."""
    pairs = tl.permute(tl.reshape(tl.join(numbers, numbers), (BLOCK_L // TURN, TURN, 2)), (0, 2, 1))
    return tl.reshape(pairs, (2 * BLOCK_L,))


@triton.jit
def joined(products, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, HIGH_LOW: tl.constexpr):
    """Products with the text from those with its two halves."""
    if HIGH_LOW:
        both = tl.reshape(products, (BLOCK_L // TURN, 2, TURN, BLOCK_N))
        products = tl.reshape(tl.sum(both, 1), (BLOCK_L, BLOCK_N))
    return products


@triton.jit
def lift_exponent(peak):
    """Biased exponent of the power of two that lifts ``peak`` to [2**13, 2**14): in fp16 ``low`` would underflow."""
    exponent = ((peak.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    return tl.minimum(tl.maximum(127 + 13 + 127 - exponent, 1), 253)  # its inverse is a normal number too


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_tb", "L"])
def _fold_text_kernel(
    text_ptr,
    weight_ptr,
    folded_ptr,
    unlift_ptr,
    stride_tb,
    stride_tl,
    stride_td,
    stride_w,
    L,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
):
    # one program folds one text row; columns from D to WIDTH become zeros, so the score kernel loads t' without a mask
    pid_b = (tl.program_id(0) // L).to(tl.int64)
    pid_l = (tl.program_id(0) % L).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    text_ptr += tl.multiple_of(pid_b * stride_tb + pid_l * stride_tl, VECTOR)
    text = tl.load(text_ptr + offs_d.to(tl.int64) * stride_td, mask=mask_d, other=0.0).to(tl.float32)
    text *= power_of_two(lift_exponent(tl.max(tl.abs(text), 0)))  # squares that fp32 holds, whatever the length
    norm = tl.maximum(tl.sqrt_rn(tl.sum(text * text, 0)), EPSILON)
    folded = tl.div_rn(text, tl.zeros_like(text) + norm)
    if weight_ptr is not None:
        folded *= tl.load(weight_ptr + offs_d * stride_w, mask=mask_d, other=0.0)
    folded_ptr += (pid_b * L * (1 + HIGH_LOW) + pid_l) * WIDTH  # (B, 1 + HIGH_LOW, L, WIDTH)
    if HIGH_LOW:
        lift = lift_exponent(tl.max(tl.abs(folded), 0))
        tl.store(unlift_ptr + pid_b * L + pid_l, power_of_two(254 - lift))
        folded *= power_of_two(lift)
        high = folded.to(folded_ptr.dtype.element_ty)
        low = tl.where(tl.abs(folded) == float("inf"), 0.0, folded - high.to(tl.float32))
        tl.store(folded_ptr + offs_d, high, mask=offs_d < WIDTH)
        tl.store(folded_ptr + L * WIDTH + offs_d, low.to(high.dtype), mask=offs_d < WIDTH)
    else:
        tl.store(folded_ptr + offs_d, folded, mask=offs_d < WIDTH)


def fold_text(
    text: torch.Tensor, weight: torch.Tensor | None, config: ScoreConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """t' as ``(B, 1 or 2, L, WIDTH)`` in the dtype of ``text``, and the ``(B, L)`` factor that undoes its scaling.

    A kernel of its own: as a prologue of the score kernel it would be redone by each of its N / block_n programs.
    """
    B, L, D = text.shape
    high_low = text.dtype != torch.float32
    width = triton.cdiv(D, config.block_d) * config.block_d
    folded = empty((B, 1 + high_low, L, width), dtype=text.dtype, device=text.device)
    unlift = empty((B, L), dtype=torch.float32, device=text.device)
    if L > 0:
        tiles = fold_config(width)
        launch(
            _fold_text_kernel,
            (B * L,),
            text,
            weight,
            folded,
            unlift,
            *text.stride(),
            0 if weight is None else weight.stride(0),
            L,
            EPSILON=reference.EPSILON,
            D=D,
            WIDTH=width,
            BLOCK_D=tiles.block_d,
            VECTOR=row_vector(text),
            HIGH_LOW=high_low,
            num_warps=tiles.num_warps,
        )
    return folded, unlift
