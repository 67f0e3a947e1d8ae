"""CDPruner (arXiv 2506.10967) in plain torch, fp64: the published choice, and the one OpenVINO GenAI makes instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers.pages import ANSWERS, END, IMAGE, START, Page, patches
from bench.peers.records import Side


def published(vision: Tensor, text: Tensor, count: int) -> Tensor:
    """Greedy DPP of ``rel_i cos(i, j) rel_j``, ``rel`` the min-maxed mean cosine to the question's tokens.

    ``vision`` ``(N, D)``, ``text`` ``(L, D)``; the mask ``(N,)`` of the chosen.
    """
    relevance = _min_max((F.normalize(vision, dim=-1) @ F.normalize(text, dim=-1).mT).mean(-1))
    return greedy(relevance[:, None] * _cosines(vision) * relevance, count)


def described(page: Page, vision: Tensor, text: Tensor, count: int) -> Tensor:
    """As above with what `Page.expected` says of OpenVINO GenAI."""
    middle, first = len(vision) // 2, count // 2
    halves = [(vision[:middle], first), (vision[middle:], count - first)]
    parts = halves if page.split else [(vision, count)]
    chosen = []
    for tokens, number in parts:
        relevance = _min_max(F.normalize(tokens, dim=-1) @ F.normalize(text.mean(0), dim=0))
        alike = _cosines(tokens)
        kernel = (1 - page.weight) * alike + page.weight * relevance[:, None] * alike * relevance
        chosen.append(greedy(kernel, number))
    return torch.cat(chosen)


def greedy(kernel: Tensor, count: int) -> Tensor:
    """The set that grows by the token that enlarges the determinant of its part of the kernel ``(N, N)`` the most."""
    chosen: list[int] = []
    for _ in range(count):
        rows = kernel[chosen]
        gains = kernel.diagonal() - (rows * torch.linalg.solve(rows[:, chosen], rows)).sum(0)
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
    return torch.zeros(len(kernel), dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)


def _cosines(x: Tensor) -> Tensor:
    normed = F.normalize(x, dim=-1)
    return normed @ normed.mT


def _min_max(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


def embeddings(model: Any, page: Page) -> tuple[Tensor, Tensor]:
    """Vision tokens ``(images, N, D)`` and the question's embeddings ``(L, D)`` of a page."""
    found = model.model.visual(patches(page), grid_thw=page.grid())
    vision = getattr(found, "pooler_output", found).double().unflatten(0, (page.images, page.tokens))
    ids = torch.tensor([number for number in page.ids() if number not in (START, END, IMAGE)])
    assert (ids < ANSWERS).all()
    return vision, model.get_input_embeddings()(ids).double()


@torch.inference_mode()
def run(model_folder: Path, page: Page) -> dict[str, Side]:
    """``published`` and ``described`` choices of a page."""
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(model_folder).double().eval()
    model.model.visual.float()  # its pixels are fp32
    vision, text = embeddings(model, page)
    kept = page.tokens * (100 - page.percent)
    held = {
        "published": published(vision.flatten(0, 1), text, page.images * kept // 100),  # a row's tokens are one set
        "described": torch.cat([described(page, image, text, round(kept / 100)) for image in vision]),
    }
    return {name: Side(chosen.view(1, 1, 1, page.images, -1), None) for name, chosen in held.items()}
