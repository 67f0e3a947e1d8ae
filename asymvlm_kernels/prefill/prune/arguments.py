"""What `prune_sequence` refuses."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from asymvlm_kernels._checks import FLOATS, check_device, check_dtype, check_mask, check_pad, check_shape
from asymvlm_kernels.budget import AtLeastRelevant
from asymvlm_kernels.prefill.spread import Spread

PADDING_SIDES = ("left", "right")


def is_stacked(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """True for ``(R, B, S)``. A tensor that could be read both ways is ``(B, S, ...)``."""
    return tensor.ndim == 3 and tensor.shape[:2] != like.shape[:2] and tensor.shape[1:] == like.shape[:2]


def check_arguments(
    embeds: torch.Tensor,
    weight: torch.Tensor | None,
    scores: torch.Tensor | None,
    masks: Mapping[str, torch.Tensor | None],
    groups: torch.Tensor | None,
    per_image: bool,
    carry: Mapping[str, torch.Tensor],
    pads: Mapping[str, float],
    padding_side: str,
) -> None:
    check_shape("embeds", embeds, ("B", "S", "D"))
    check_dtype("embeds", embeds, FLOATS)
    if weight is not None:
        check_shape("weight", weight, (embeds.shape[2],))
        check_dtype("weight", weight, (torch.float32,))
        check_device("weight", weight, embeds)
    if scores is not None:
        if weight is not None:
            raise ValueError("weight belongs to the similarity that scores replace: give one of them, got both")
        check_shape("scores", scores, tuple(embeds.shape[:2]))
        check_dtype("scores", scores, (torch.float32,))
        check_device("scores", scores, embeds)
    for name, mask in masks.items():
        check_mask(name, mask, embeds)
    if groups is not None:
        check_shape("groups", groups, tuple(embeds.shape[:2]))
        check_dtype("groups", groups, (torch.int64, torch.int32))
        check_device("groups", groups, embeds)
    elif per_image:
        raise ValueError("per_image=True needs groups, got None")
    for name, tensor in carry.items():
        if tensor.shape[:2] != embeds.shape[:2] and not is_stacked(tensor, embeds):
            B, S = embeds.shape[:2]
            raise ValueError(
                f"carry[{name!r}] must have shape ({B}, {S}, ...) or (R, {B}, {S}), got {tuple(tensor.shape)}"
            )
        check_device(f"carry[{name!r}]", tensor, embeds)
        check_pad(f"carry_pad[{name!r}]", pads.get(name, 0), tensor.dtype)
    for name in pads:
        if name not in carry:
            raise ValueError(
                f"carry_pad must name tensors of carry, {', '.join(carry) or 'which is empty'}; got {name}"
            )
    if padding_side not in PADDING_SIDES:
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")


def check_rules(
    embeds: torch.Tensor, spread: Spread | None, lines: torch.Tensor | None, floor: AtLeastRelevant | None
) -> None:
    if spread is not None:
        if not isinstance(spread, Spread):
            raise ValueError(f"spread must be None or Spread(reach=4, share=0.7), got {spread!r}")
        if lines is None:
            raise ValueError("spread needs lines, got None")
        check_shape("lines", lines, tuple(embeds.shape[:2]))
        check_dtype("lines", lines, (torch.int64, torch.int32))
        check_device("lines", lines, embeds)
    if floor is not None and not isinstance(floor, AtLeastRelevant):
        raise ValueError(f"floor must be None or AtLeastRelevant(), got {floor!r}")
