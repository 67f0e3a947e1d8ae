"""Checks and normal forms shared by the attention functions of this phase. Nothing here reads a tensor's values."""

from __future__ import annotations

from typing import NamedTuple

import torch

from asymvlm_kernels._checks import FLOATS, check_device, check_dtype, check_number, check_shape

INTEGERS = (torch.int32, torch.int64)
MAXIMUM_WIDTH = 256  # of a head, as in FlashAttention
LARGEST = 2**31 - 1  # position or window that the ops know


class Slots(NamedTuple):
    """Which slots a query row may see, in the order that the ops take it."""

    seqlens: torch.Tensor | None  # (B,)
    leftpad: torch.Tensor | None  # (B,)
    slot_pos: torch.Tensor | None  # (B, S)
    q_pos: torch.Tensor | None  # (B, Q)


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, names: tuple[str, str, str]) -> None:
    """``(B, Q, H, D)`` queries against ``(B, S, G, D)`` keys and values, rows of D contiguous."""
    name_q, name_k, name_v = names
    check_shape(name_q, q, ("B", "Q", "H", "D"))
    B, _, H, D = q.shape
    check_shape(name_k, k, (B, "S", "G", D))
    if v is not None:
        check_shape(name_v, v, tuple(k.shape))
    check_dtype(name_q, q, FLOATS)
    for name, tensor in ((name_q, q), (name_k, k), (name_v, v)):
        if tensor is not None:
            check_dtype(name, tensor, (q.dtype,))
            check_device(name, tensor, q)
            if tensor.stride(-1) != 1 and D > 1:
                raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
    G = k.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"the heads of {name_q} must be a multiple of the {G} heads of {name_k}, got {H}")
    if not 0 < D <= MAXIMUM_WIDTH:
        raise ValueError(f"head_dim must be 1 to {MAXIMUM_WIDTH}, got {D}")


def slots(
    q: torch.Tensor,
    k: torch.Tensor,
    seqlens: int | torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
) -> Slots:
    """Checked, and within int32. ``q_pos`` of shape ``(B,)`` is that of the last row, the rows before it count down."""
    B, Q = q.shape[:2]
    if isinstance(seqlens, int):
        if not 0 <= seqlens <= k.shape[1]:
            raise ValueError(f"cache_seqlens must be 0 to the {k.shape[1]} slots of the cache, got {seqlens}")
        seqlens = torch.full((B,), seqlens, dtype=torch.int32, device=q.device)
    for name, tensor in (("cache_seqlens", seqlens), ("cache_leftpad", leftpad)):
        if tensor is not None:
            check_shape(name, tensor, (B,))
            check_dtype(name, tensor, INTEGERS)
            check_device(name, tensor, q)
    if (slot_pos is None) != (q_pos is None):
        raise ValueError(f"slot_pos and q_pos go together, got only {'slot_pos' if q_pos is None else 'q_pos'}")
    seqlens, leftpad = (None if x is None else _within_int32(x) for x in (seqlens, leftpad))
    if slot_pos is None or q_pos is None:
        return Slots(seqlens, leftpad, None, None)
    check_shape("slot_pos", slot_pos, (B, k.shape[1]))
    check_dtype("slot_pos", slot_pos, (torch.int32,))
    check_device("slot_pos", slot_pos, q)
    check_shape("q_pos", q_pos, (B,) if q_pos.ndim == 1 else (B, Q))
    check_dtype("q_pos", q_pos, INTEGERS)
    check_device("q_pos", q_pos, q)
    if Q != 1:  # a negative row sees nothing; less than -1 would take the window of the rows beside it past int32
        q_pos = _within_int32(q_pos).clamp_min(-1)
    if q_pos.ndim == 1:
        q_pos = q_pos[:, None]
        if Q != 1:
            q_pos = (q_pos - torch.arange(Q - 1, -1, -1, dtype=q_pos.dtype, device=q.device)).clamp_min_(-1)
    return Slots(seqlens, leftpad, slot_pos, q_pos)


def _within_int32(numbers: torch.Tensor) -> torch.Tensor:
    """Lengths and positions as int32: no cache has more slots, and a negative one means nothing is seen."""
    return numbers if numbers.dtype == torch.int32 else numbers.clamp(-1, LARGEST).to(torch.int32)


def window(window_size: tuple[int, int], causal: bool, slot_pos: torch.Tensor | None) -> tuple[int, int]:
    """FlashAttention's ``(left, right)``: that many slots beside the own one; -1 is no bound, causal is right = 0."""
    left, right = (min(int(size), LARGEST) for size in window_size)
    if min(left, right) < -1:
        raise ValueError(f"window_size must be two numbers of -1 or more, got {tuple(window_size)}")
    if slot_pos is not None and right > 0:
        raise ValueError(f"with slot_pos a row never sees later positions: window_size[1] must be -1 or 0, got {right}")
    return left, 0 if causal else right


def scale(softmax_scale: float | None, softcap: float, D: int) -> float:
    """The scale of the logits; a cap or scale that would make every logit 0 or NaN is refused."""
    check_number("softcap", softcap, least=0)
    if softmax_scale is None:
        return float(D**-0.5)
    check_number("softmax_scale", softmax_scale)
    return float(softmax_scale)


def check_score_rows(score_rows: int, Q: int) -> None:
    if not 1 <= score_rows <= Q:
        raise ValueError(f"score_rows must be 1 to the {Q} rows of q, got {score_rows}")


def check_unsupported(function: str, **values: object) -> None:
    """Arguments of FlashAttention that would change the answer and that we do not compute."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor) or value:
            shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{function} does not support {name}, got {shown}")
