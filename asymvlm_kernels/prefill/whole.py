"""All of `prune_sequence` as one op, for a result whose length the host knows: one launch where the CUDA library runs.

Elsewhere it is `score_select` and `gather_sequence`, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asymvlm_kernels.dispatch import define_cuda, define_op
from asymvlm_kernels.prefill import fused
from asymvlm_kernels.prefill.cuda import carry_of, carry_words, prune
from asymvlm_kernels.prefill.one_launch import prune_in_one_launch
from asymvlm_kernels.tuning.paths import prefill_path

PruneStatic = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]
]


def _prune_static_reference(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    *results, order = fused._score_select_reference(*tokens, ratios, numbers, capacity)
    moved = fused._gather_sequence_reference(embeds, order, results[3], carry, pads, stacked, capacity, left)
    return (*results, *moved)  # type: ignore[return-value]


def _prune_static_triton(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    if capacity > 0 and prefill_path(embeds.device).launches == 1:
        (*results, order), moved = prune_in_one_launch(tokens, ratios, numbers, carry, pads, stacked, capacity, left)
        return (*results, *moved)  # type: ignore[return-value]
    *results, order = fused._score_select_triton(*tokens, ratios, numbers, capacity)
    moved = fused._gather_sequence_triton(embeds, order, results[3], carry, pads, stacked, capacity, left)
    return (*results, *moved)  # type: ignore[return-value]


def _prune_static_cuda(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    if embeds.numel() == 0:
        return _prune_static_reference(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    outputs = _prune_static_fake(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    *results, out, index, outs = outputs
    words = [carry_words(tensor, is_stacked) for tensor, is_stacked in zip(carry, stacked, strict=True)]
    carries = [
        carry_of(word, result, is_stacked, pad, result.dtype)
        for word, result, is_stacked, pad in zip(words, outs, stacked, pads, strict=True)
    ]
    prune(tokens, (*results, None, out, index), ratios, numbers, capacity, left, carries)
    return outputs


def _prune_static_fake(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    *results, order = fused._score_select_fake(*tokens, ratios, numbers, capacity)
    moved = fused._gather_sequence_fake(embeds, order, results[3], carry, pads, stacked, capacity, left)
    return (*results, *moved)  # type: ignore[return-value]


prune_static = define_op(
    "prune_static(Tensor embeds, Tensor vision_mask, Tensor text_mask, Tensor? protect, Tensor? weight, int[] ratios, "
    "float[] numbers, Tensor[] carry, Scalar[] pads, bool[] stacked, SymInt capacity, bool left) -> (Tensor scores, "
    "Tensor gap, Tensor counts, Tensor lengths, Tensor out, Tensor index, Tensor[] carried)",
    reference=_prune_static_reference,
    triton=_prune_static_triton,
    fake=_prune_static_fake,
)
define_cuda("prune_static", _prune_static_cuda)
