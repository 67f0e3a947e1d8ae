"""FlashAttention 2.8's two inference functions, with one thing more: the score of every key.

``score[b, s] = mean_h softmax(q[b, h] k[b, s])``, over the query heads of the last row (or rows). FlashAttention never
forms it, eager attention forms all of ``(B, H, Q, S)``.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels.decode import arguments
from asymvlm_kernels.decode.attend import attend_slots
from asymvlm_kernels.launch import Remembered, outline

_options = Remembered()  # of calls that were in order, by what the checks look at


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_scores: bool = False,
    score_rows: int = 1,
) -> Any:
    """``flash_attn.flash_attn_func`` for inference, and on request the scores of the keys.

    Args:
        q: ``(B, Q, H, D)`` fp32, fp16 or bf16, D at most 256 and contiguous, other strides free.
        k: ``(B, S, G, D)``, H a multiple of G. v: the same. A cache of layout ``(B, G, S, D)`` goes in transposed.
        softmax_scale: None means ``D ** -0.5``, as in FlashAttention; many models want another one.
        causal: aligned to the bottom right corner. window_size: ``(left, right)``, -1 is no bound.
        softcap: above 0 the logits become ``softcap * tanh(logits / softcap)``.
        dropout_p, alibi_slopes: not supported. deterministic: always so.
        return_attn_probs: return the logsumexp too.
        return_scores: return the fp32 scores ``(B, S)`` too: probabilities of the last ``score_rows`` rows, mean over
            rows and heads. They sum to 1 unless one of these rows sees no key (it counts as 0).
    Returns:
        What FlashAttention returns: ``out (B, Q, H, D)``, or ``(out, lse (B, H, Q) fp32, an empty tensor)`` with
        ``return_attn_probs``; the scores come last. A row that sees nothing gets an output of 0 and an lse of +inf.
    Raises:
        ValueError: on rank, size, dtype, device or stride mismatch, an unsupported argument, or an input that requires
            grad in grad mode.

    The output is bitwise the same with and without scores, and below 64 rows for a sample in any batch. From 64 rows on
    it comes from the flash-attn package or from PyTorch's attention where those can compute it. Does not synchronise.
    """
    arguments.check_unsupported("flash_attn_func", dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    arguments.check_heads(q, k, v, ("q", "k", "v"))
    check_no_grad("flash_attn_func", q=q, k=k, v=v)
    slots, rows = arguments.Slots(None, None, None, None), score_rows if return_scores else None
    options = _check_options(q, softmax_scale, causal, window_size, softcap, 0, None, rows)
    out, lse, scores = attend_slots(q, k, v, *slots, *options, 0, return_attn_probs, rows or 0)
    found = _returned(out, lse, scores, return_attn_probs, return_scores)
    return (*found[:2], q.new_empty(0), *found[2:]) if return_attn_probs else found


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    return_scores: bool = False,
    score_rows: int = 1,
    slot_pos: torch.Tensor | None = None,
    q_pos: torch.Tensor | None = None,
) -> Any:
    """``flash_attn.flash_attn_with_kvcache``, with scores on request and slots in any order.

    Args:
        q: ``(B, Q, H, D)`` fp32, fp16 or bf16, D at most 256 and contiguous, other strides free.
        k_cache: ``(B, S, G, D)``, H a multiple of G. v_cache: the same. Strided views are read where they lie, so a
            cache of layout ``(B, G, S, D)`` goes in as ``cache.transpose(1, 2)``.
        k, v: ``(B, new, G, D)``, written in place from slot ``cache_seqlens`` on before attention. The cache must have
            room for them: on a GPU a device-side assertion tells. Not with ``slot_pos``, whose owner chooses the slots.
        cache_seqlens: ``(B,)`` int32 or int64, or one number: slots in use (before ``k``); None means S.
        cache_leftpad: ``(B,)`` int32 or int64: first slot in use.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`; the last row of q stands at the last slot
            in use.
        rotary_cos, rotary_sin, cache_batch_idx, block_table, alibi_slopes: not supported. rotary_interleaved: unused.
        num_splits: parts of the cache that are read side by side; 0 chooses by S, G and D, never by the batch.
        return_softmax_lse: return the logsumexp ``(B, H, Q)`` fp32 too.
        return_scores, score_rows: as in `flash_attn_func`; scores are ``(B, S)``, 0 at slots that no row sees.
        slot_pos: ``(B, S)`` int32: the position of the token in each slot, -1 = free. q_pos: ``(B, Q)`` int32 or int64,
            the positions of the rows, or ``(B,)``, that of the last one. A row sees a slot iff ``0 <= pos <= q_pos``
            and ``pos >= q_pos - window_size[0]``: one rule for padding, freed slots and windows. Within
            ``cache_leftpad`` and ``cache_seqlens``, where given.
    Returns:
        ``out``, or ``(out, lse)`` with ``return_softmax_lse``; the scores come last. A row that sees nothing gets an
        output of 0 and an lse of +inf, as in FlashAttention.
    Raises:
        ValueError: on rank, size, dtype, device or stride mismatch, an unsupported argument, or an input that requires
            grad in grad mode.

    What lies in slots that nobody sees, NaN included, has no influence. The output is bitwise the same with and without
    scores, and for a sample in any batch (of the same S). Does not synchronise.
    """
    if not (rotary_cos is rotary_sin is cache_batch_idx is block_table is alibi_slopes is None):
        arguments.check_unsupported(
            "flash_attn_with_kvcache",
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_batch_idx=cache_batch_idx,
            block_table=block_table,
            alibi_slopes=alibi_slopes,
        )
    rows = score_rows if return_scores else None
    places = (cache_seqlens, cache_leftpad, slot_pos, q_pos)
    inputs = (q, k_cache, v_cache, *places, softmax_scale, causal, window_size, softcap, num_splits, score_rows)
    key = None if torch.compiler.is_compiling() else outline((*inputs, return_scores))
    options = None if key is None else _options.get(key)
    if options is not None and k is None and v is None:  # a call like one before, which was in order
        check_no_grad("flash_attn_with_kvcache", q=q, k_cache=k_cache, v_cache=v_cache)
        out, lse, scores = attend_slots(
            q, k_cache, v_cache, *places, *options, num_splits, return_softmax_lse, rows or 0
        )
        return _returned(out, lse, scores, return_softmax_lse, return_scores)
    arguments.check_heads(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    check_no_grad("flash_attn_with_kvcache", q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    slots = arguments.slots(q, k_cache, *places)
    options = _check_options(q, softmax_scale, causal, window_size, softcap, num_splits, slots.slot_pos, rows)
    if k is not None or v is not None:  # only a call that nothing else refuses may write
        slots = slots._replace(seqlens=_append_(k_cache, v_cache, k, v, slots))
    elif key is not None and all(slot is place for slot, place in zip(slots, places)):
        _options.put(key, options)
    out, lse, scores = attend_slots(q, k_cache, v_cache, *slots, *options, num_splits, return_softmax_lse, rows or 0)
    return _returned(out, lse, scores, return_softmax_lse, return_scores)


def _check_options(
    q: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    num_splits: int,
    slot_pos: torch.Tensor | None,
    score_rows: int | None,
) -> tuple[float, int, int, float]:
    """The scale, the window and the cap, as `attend_slots` takes them."""
    left, right = arguments.window(window_size, causal, slot_pos)
    if score_rows is not None:
        arguments.check_score_rows(score_rows, q.shape[1])
    if num_splits < 0:
        raise ValueError(f"num_splits must be 0 or more, got {num_splits}")
    return arguments.scale(softmax_scale, softcap, q.shape[-1]), left, right, float(softcap)


def _append_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, slots: arguments.Slots
) -> torch.Tensor:
    """Write the new rows behind those in use; the new lengths."""
    if k is None or v is None:
        raise ValueError(f"k and v go together, got only {'k' if v is None else 'v'}")
    if slots.seqlens is None:
        raise ValueError("k and v need cache_seqlens, the slots that they are written to, got None")
    if slots.slot_pos is not None:
        raise ValueError("k and v are appended by cache_seqlens: with slot_pos write them to their slots first")
    B, _, G, D = k_cache.shape
    for name, new in (("k", k), ("v", v)):
        check_shape(name, new, (B, k.shape[1] if k.ndim > 1 else "new", G, D))
        check_dtype(name, new, (k_cache.dtype,))
        check_device(name, new, k_cache)
    _check_room(slots.seqlens, k.shape[1], k_cache.shape[1])
    place = slots.seqlens[:, None] + torch.arange(k.shape[1], device=k.device)
    place = place.masked_fill(place < 0, k_cache.shape[1])  # a GPU refuses that, where -1 would be the last slot
    batch = torch.arange(B, device=k.device)[:, None]
    k_cache[batch, place] = k
    v_cache[batch, place] = v
    return slots.seqlens + k.shape[1]


def _check_room(seqlens: torch.Tensor, new: int, slots: int) -> None:
    """Before anything is written. A compiled call and a GPU, which would have to wait, refuse at the first write."""
    if new > slots:
        raise ValueError(f"k and v must fit the {slots} slots of the cache, got {new} rows")
    if seqlens.device.type != "cpu" or seqlens.numel() == 0 or torch.compiler.is_compiling():
        return
    lowest, highest = (int(length) for length in seqlens.aminmax())
    if lowest < 0 or highest + new > slots:
        found = lowest if lowest < 0 else highest
        raise ValueError(
            f"cache_seqlens must be 0 to {slots - new}, to leave room for {new} rows in {slots} slots, got {found}"
        )


def _returned(out: torch.Tensor, lse: torch.Tensor, scores: torch.Tensor, with_lse: bool, with_scores: bool) -> Any:
    results = (out, lse) if with_lse else (out,)
    results = (*results, scores) if with_scores else results
    return results if len(results) > 1 else out
