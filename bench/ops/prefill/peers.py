"""What each op is compared with: the plain PyTorch that one would write without this library."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

EPSILON = 1e-12
Function = Callable[..., torch.Tensor]


def unit(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(EPSILON)


def literal_scores(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 1 as written: normalise V, weight it, multiply, reduce."""
    return ((unit(vision) * weight) @ unit(text).mT).amax(-1)


def folded_scores(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 1 with weight and norms moved off V: no normalised copy, but an fp32 one."""
    wide = vision.float()
    similarity = (wide @ (unit(text) * weight).mT).amax(-1)
    return similarity / torch.linalg.vector_norm(wide, dim=-1).clamp_min(EPSILON)


def rounded_scores(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Folded, with t' and the product in the dtype of V: fast units, no fp32 copy; the rounding swaps near ties."""
    similarity = (vision @ (unit(text) * weight).to(vision.dtype).mT).amax(-1).float()
    norm = torch.linalg.vector_norm(vision, dim=-1, dtype=torch.float32)
    return similarity / norm.clamp_min(EPSILON)


def topk_select(scores: torch.Tensor, K: int) -> torch.Tensor:
    """Ascending index of the K best. Which of two equal scores wins is not defined."""
    return scores.topk(K, dim=-1).indices.sort(dim=-1).values


def sort_select(scores: torch.Tensor, K: int) -> torch.Tensor:
    """The same from a stable sort: ties go to the lowest index, as in ours."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :K].sort(dim=-1).values


def index_gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], index]


def take_gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))


def mask_prune(
    embeds: torch.Tensor, vision_mask: torch.Tensor, text_mask: torch.Tensor, weight: torch.Tensor, K: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score, keep and close the gaps with boolean masks, Eq. 1 as written. The masks synchronise a GPU."""
    B, _, D = embeds.shape
    scores = literal_scores(embeds[vision_mask].view(B, -1, D), embeds[text_mask].view(B, -1, D), weight)
    place = vision_mask.nonzero()[:, 1].view(B, -1).gather(1, scores.topk(K).indices)
    keep = text_mask.scatter(1, place, True)
    return embeds[keep].view(B, -1, D), keep.nonzero()[:, 1].view(B, -1)


def slice_prune(
    embeds: torch.Tensor, start: int, N: int, weight: torch.Tensor, K: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where the host knows that vision is one block of N: slices, folded scores, no synchronisation."""
    B, S, _ = embeds.shape
    text = torch.cat((embeds[:, :start], embeds[:, start + N :]), dim=1)
    kept = topk_select(folded_scores(embeds[:, start : start + N], text, weight), K) + start
    places = torch.arange(S, device=embeds.device).expand(B, S)
    index = torch.cat((places[:, :start], kept, places[:, start + N :]), dim=1)
    return index_gather(embeds, index), index


def compiled(function: Function, device: str) -> Function:
    """``torch.compile`` at its strongest, from the first call on: importing the compiler alone takes seconds.

    CUDA graphs are left to the harness, which captures every variant alike.
    """
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None

    @functools.cache
    def build() -> Function:
        return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)

    return lambda *inputs: build()(*inputs)
