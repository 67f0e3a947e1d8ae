"""Attention that each key receives: ``sum[b, g, s] = mean over the heads of g, sum over queries of p[b, h, q, s]``.

H2O adds these sums up, SnapKV takes those of the last queries, VL-Cache those behind the images.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels.decode import arguments, reference
from asymvlm_kernels.dispatch import define_op


def _attention_column_sums_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], k.shape[2], k.shape[1]), dtype=torch.float32)


_attention_column_sums = define_op(
    "attention_column_sums(Tensor q, Tensor k, Tensor? lse, Tensor q_pos, Tensor? slot_pos, float scale, SymInt left, "
    "float softcap) -> Tensor",
    reference=reference.attention_column_sums,
    fake=_attention_column_sums_fake,
    triton=None,
)


def attention_column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window: int = -1,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much attention each key receives from all queries: the column sums of the attention matrix, without it.

    Args:
        q: ``(B, Q, H, D)`` fp32, fp16 or bf16, any strides but the last.
        k: ``(B, S, G, D)``, the G heads shared by ``H / G`` query heads each.
        q_pos: ``(B, Q)`` int32 or int64: the position of each query; negative: no query, which adds nothing.
        slot_pos: ``(B, S)`` int32: the position of each key; negative: nobody sees it. None: 0 to S - 1. A query sees
            the keys with ``0 <= slot_pos <= q_pos``; one position for all queries (S - 1) is attention without a
            causal mask.
        softmax_scale: of the logits; ``D ** -0.5`` if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is no cap.
        window: a query also sees no key more than so many positions before its own; -1 is no bound. (A sliding window
            of W tokens, the own one included, is ``window=W - 1``.)
        lse: ``(B, H, Q)`` fp32: the natural logarithm of each query's sum, of the same scale, cap, window and slots,
            where attention has it already. It spares one of two passes.
    Returns:
        ``(B, G, S)`` fp32: the sum over queries, the mean over the query heads of each K/V head. 0 where nobody looks.
    Raises:
        ValueError: on rank, size, dtype, device or stride mismatch, or an input that requires grad in grad mode.

    Work is that of attention's logits, once or twice; memory is the result, one number a query and a block of logits.
    The order of every sum depends on sizes only: a sample has the same bits alone and in any batch. Does not
    synchronise.
    """
    arguments.check_heads(q, k, None, ("q", "k", "v"))
    B, Q, H, D = q.shape
    check_shape("q_pos", q_pos, (B, Q))
    check_dtype("q_pos", q_pos, arguments.INTEGERS)
    check_device("q_pos", q_pos, q)
    if slot_pos is not None:
        check_shape("slot_pos", slot_pos, (B, k.shape[1]))
        check_dtype("slot_pos", slot_pos, (torch.int32,))
        check_device("slot_pos", slot_pos, q)
    if lse is not None:
        check_shape("lse", lse, (B, H, Q))
        check_dtype("lse", lse, (torch.float32,))
        check_device("lse", lse, q)
    check_no_grad("attention_column_sums", q=q, k=k, lse=lse)
    if isinstance(window, bool) or not isinstance(window, int) or window < -1:
        raise ValueError(f"window must be a whole number of -1 or more, got {window!r}")
    scale = arguments.scale(softmax_scale, softcap, D)
    left = min(window, arguments.LARGEST)
    rows = q_pos if q_pos.dtype == torch.int32 else q_pos.clamp(-1, arguments.LARGEST).to(torch.int32)
    sums: torch.Tensor = _attention_column_sums(q, k, lse, rows, slot_pos, scale, left, float(softcap))
    return sums
