"""All of `prune_sequence` as one op, for a result whose length the host knows: both launches, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import remember
from asymvlm_kernels.prefill.prune import two_launches
from asymvlm_kernels.straight import straight

PruneStatic = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    list[torch.Tensor],
    list[torch.Tensor],
]


def in_turn(score_select: Callable[..., Any], gather: Callable[..., Any]) -> Callable[..., PruneStatic]:
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
        *told: Any,
    ) -> PruneStatic:
        tokens = (embeds, vision_mask, text_mask, protect, weight)
        *results, order, own = score_select(*tokens, ratios, numbers, capacity, given, *told)
        moved = gather(embeds, order, results[3], carry, pads, stacked, capacity, left)
        return (*results, *moved, own)

    return run


_prune_static_reference = in_turn(two_launches._score_select_reference, two_launches._gather_sequence_reference)
_prune_static_triton = remember(in_turn(two_launches._score_select_triton, two_launches._gather_sequence_triton))
_prune_static_fake = in_turn(two_launches._score_select_fake, two_launches._gather_sequence_fake)


prune_static = straight(
    define_op(
        "prune_static(Tensor embeds, Tensor vision_mask, Tensor text_mask, Tensor? protect, Tensor? weight, "
        "SymInt[] ratios, float[] numbers, Tensor[] carry, Scalar[] pads, bool[] stacked, SymInt capacity, bool left, "
        "Tensor? given=None, " + two_launches.TOLD + ") -> "
        "(Tensor scores, Tensor gap, Tensor counts, Tensor lengths, Tensor out, Tensor index, Tensor[] carried, "
        "Tensor[] own)",
        reference=_prune_static_reference,
        triton=_prune_static_triton,
        fake=_prune_static_fake,
    )
)
