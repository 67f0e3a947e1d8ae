"""One sample at a time in plain Python, straight from the definitions: what `prune_sequence` has to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from asymvlm_kernels.testing import literal_scores


@dataclass
class Kept:
    """Of one sample."""

    places: list[int]  # ascending
    count: int  # K
    gap: float
    scores: dict[int, float]


def best(places: Sequence[int], scores: dict[int, float], count: int) -> list[int]:
    """Higher score first, then lower index, NaN last."""
    return sorted(places, key=lambda i: (math.isnan(scores[i]), -scores[i], i))[:count]


def importance_gap(scores: dict[int, float]) -> float:
    ranked = [scores[i] for i in best(list(scores), scores, len(scores))]
    k = max(1, len(ranked) // 4)
    return ranked[k - 1] - ranked[len(ranked) - k] if ranked else math.nan


def image_floors(images: dict[int, list[int]]) -> dict[int, int]:
    """Tokens that each image keeps at least: none in a sample of one image."""
    if len(images) < 2:
        return dict.fromkeys(images, 0)
    return {image: min(len(places), max(8, len(places) // 16)) for image, places in images.items()}


def by_image(places: Sequence[int], groups: Sequence[int]) -> dict[int, list[int]]:
    return {image: [i for i in places if groups[i] == image] for image in {groups[i] for i in places}}


def prune_sample(
    embeds: torch.Tensor,
    vision: Sequence[bool],
    text: Sequence[bool],
    weight: torch.Tensor | None,
    millionths: Callable[[float], int],
    protect: Sequence[bool],
    groups: Sequence[int] | None,
    per_image: bool,
    capacity: int | None = None,
) -> Kept:
    S = len(vision)
    prunable = [i for i in range(S) if vision[i] and not protect[i]]
    always = [i for i in range(S) if (text[i] or protect[i]) and i not in prunable]
    question = [i for i in range(S) if text[i] and not vision[i]]
    if question and prunable:
        values = literal_scores(embeds[None, prunable], embeds[None, question], weight, torch.float64)[0].tolist()
    else:
        values = [-math.inf] * len(prunable)
    scores = dict(zip(prunable, values, strict=True))
    gap = importance_gap(scores)
    N = len(prunable)
    ratio = millionths(gap)
    K = min(max(N * ratio // 1_000_000, 1), N) if question else N
    sure: list[int] = []
    if groups is not None:
        images = by_image(prunable, groups)
        floors = image_floors(images)
        for image, places in images.items():
            share = max(len(places) * ratio // 1_000_000, 1) if per_image else 0
            sure += best(places, scores, max(floors[image], share))
        K = K if not question else len(sure) if per_image else max(K, len(sure))
    rest = [i for i in prunable if i not in sure]
    kept = best(sure, scores, len(sure)) + best(rest, scores, K - len(sure))
    # what is cut last comes first
    kept = (question + [i for i in always if i not in question] + kept)[:capacity]
    return Kept(sorted(kept), len({*kept} & {*prunable}), gap, scores)
