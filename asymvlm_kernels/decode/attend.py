"""Attention over cache slots that also returns each slot's score: the op behind `flash_attn_with_kvcache`."""

from __future__ import annotations

import torch

from asymvlm_kernels.decode import reference
from asymvlm_kernels.dispatch import define_op


def _attend_slots_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int,
    score_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, Q, H, _ = q.shape
    lse = q.new_empty((B, H, Q), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty((B, k.shape[1] if score_rows else 0), dtype=torch.float32)


attend_slots = define_op(
    "attend_slots(Tensor q, Tensor k, Tensor v, Tensor? seqlens, Tensor? leftpad, Tensor? slot_pos, Tensor? q_pos, "
    "float scale, SymInt left, SymInt right, float softcap, SymInt num_splits, SymInt score_rows) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.attend_slots,
    triton=None,
    fake=_attend_slots_fake,
)
