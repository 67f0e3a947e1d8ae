"""Several images in one sample: the tokens each image is sure to keep, whatever the others score.

Plain PyTorch on the device of the scores: B x S numbers, no synchronisation. One answer for every backend.
"""

from __future__ import annotations

import torch

from asymvlm_kernels.millionths import MILLION
from asymvlm_kernels.prefill.reference import rank_scores
from asymvlm_kernels.ranking import order_key

MINIMUM_TOKENS = 8  # an image keeps at least max(8, N_image // 16) tokens, or all it has
MINIMUM_SHARE = 16


def guaranteed_tokens(
    scores: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, millionths: torch.Tensor | None = None
) -> torch.Tensor:
    """Mark the best tokens of each image, up to the number the image is sure to keep.

    Args:
        scores: ``(B, S)`` fp32.
        mask: ``(B, S)`` bool, True = prunable vision token.
        groups: ``(B, S)`` integer image numbers, read where ``mask`` is True.
        millionths: ``(B,)`` int64 keep ratio of each row, to rank every image by itself; None for the floors alone.
    Returns:
        ``(B, S)`` bool. The floor of an image is ``max(8, N_image // 16)`` in rows with two images or more, else 0.
    """
    B, S = scores.shape
    places = torch.arange(S, device=scores.device).expand(B, S)
    best_first = order_key(scores, mask).argsort(dim=-1, descending=True, stable=True)
    outside = torch.iinfo(groups.dtype).max  # tokens outside the mask form a last group of their own
    image = groups.masked_fill(~mask, outside).gather(-1, best_first)
    image, by_image = image.sort(dim=-1, stable=True)
    order = best_first.gather(-1, by_image)  # by image, best first within one
    inside = mask.gather(-1, order)
    starts = torch.ones_like(inside)
    starts[:, 1:] = (image[:, 1:] != image[:, :-1]) | (inside[:, 1:] != inside[:, :-1])  # an image may have that number
    rank = places - torch.where(starts, places, 0).cummax(-1).values
    number = starts.cumsum(-1) - 1
    sizes = torch.zeros_like(places).scatter_add(-1, number, torch.ones_like(places)).gather(-1, number)
    several = (starts & inside).sum(-1, keepdim=True) >= 2
    floors = torch.where(several, (sizes // MINIMUM_SHARE).clamp_min(MINIMUM_TOKENS).minimum(sizes), 0)
    if millionths is not None:
        floors = floors.maximum((sizes * millionths[:, None] // MILLION).clamp_min(1))
    sure = (rank < floors) & inside
    return torch.zeros_like(mask).scatter(-1, order, sure)


def rank_sure(
    scores: torch.Tensor, mask: torch.Tensor, must_stay: torch.Tensor, text: torch.Tensor, sure: torch.Tensor
) -> torch.Tensor:
    """`rank_scores` with the tokens that their images are sure to keep between the protected ones and the others.

    Both parts keep the order of their scores, so the rank of a token is its place among all, counted down: exact in
    fp32 for a row of up to 2**24 tokens.
    """
    B, S = scores.shape
    key = order_key(scores, mask) + sure.long() * 2**33  # above every key of `order_key`
    best_first = key.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(0, -S, -1, dtype=torch.float32, device=scores.device)
    return rank_scores(torch.empty_like(scores).scatter_(-1, best_first, place.expand(B, S)), must_stay, text)
