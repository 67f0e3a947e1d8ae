"""All of `prune_sequence` as one op, for a result whose length the host knows: one launch where the CUDA library runs.

Elsewhere it is `score_select` and `gather_sequence`, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from asymvlm_kernels.dispatch import define_cuda, define_op
from asymvlm_kernels.prefill.cuda import carry_of, carry_words, prune, refuse_given
from asymvlm_kernels.prefill.one_launch import prune_in_one_launch
from asymvlm_kernels.prefill.prune import two_launches
from asymvlm_kernels.tuning.paths import prefill_path

PruneStatic = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]
]


def _in_turn(score_select: Callable[..., Any], gather: Callable[..., Any]) -> Callable[..., PruneStatic]:
    """Both halves of `prune_sequence` as one function."""

    def run(
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
        given: torch.Tensor | None = None,
    ) -> PruneStatic:
        tokens = (embeds, vision_mask, text_mask, protect, weight)
        *results, order = score_select(*tokens, ratios, numbers, capacity, given)
        moved = gather(embeds, order, results[3], carry, pads, stacked, capacity, left)
        return (*results, *moved)

    return run


_prune_static_reference = _in_turn(two_launches._score_select_reference, two_launches._gather_sequence_reference)
_prune_static_two_launches = _in_turn(two_launches._score_select_triton, two_launches._gather_sequence_triton)
_prune_static_fake = _in_turn(two_launches._score_select_fake, two_launches._gather_sequence_fake)


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
    given: torch.Tensor | None = None,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    if given is None and capacity > 0 and prefill_path(embeds.device).launches == 1:
        (*results, order), moved = prune_in_one_launch(tokens, ratios, numbers, carry, pads, stacked, capacity, left)
        return (*results, *moved)  # type: ignore[return-value]
    return _prune_static_two_launches(*tokens, ratios, numbers, carry, pads, stacked, capacity, left, given)


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
    given: torch.Tensor | None = None,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    refuse_given(given)
    if embeds.numel() == 0:
        return _prune_static_reference(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    outputs = _prune_static_fake(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    *results, out, index, outs = outputs
    words = [carry_words(tensor, is_stacked) for tensor, is_stacked in zip(carry, stacked, strict=True)]
    carries = [
        carry_of(word, result, is_stacked, pad, result.dtype)
        for word, result, is_stacked, pad in zip(words, outs, stacked, pads)
    ]
    prune(tokens, (*results, None, out, index), ratios, numbers, capacity, left, carries)
    return outputs


prune_static = define_op(
    "prune_static(Tensor embeds, Tensor vision_mask, Tensor text_mask, Tensor? protect, Tensor? weight, "
    "SymInt[] ratios, float[] numbers, Tensor[] carry, Scalar[] pads, bool[] stacked, SymInt capacity, bool left, "
    "Tensor? given=None) -> "
    "(Tensor scores, Tensor gap, Tensor counts, Tensor lengths, Tensor out, Tensor index, Tensor[] carried)",
    reference=_prune_static_reference,
    triton=_prune_static_triton,
    fake=_prune_static_fake,
)
define_cuda("prune_static", _prune_static_cuda)
