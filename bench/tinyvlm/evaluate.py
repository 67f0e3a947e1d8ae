"""Samples of one question each, and exact match by teacher forcing, with any set of vision tokens kept.

Teacher forcing equals greedy decoding for exact match: an answer is right if every token is the most likely one after
the right tokens before it, and greedy decoding has then put just those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.tinyvlm.batches import IGNORED, turn_ids
from bench.tinyvlm.glyphs import BOS, PAD
from bench.tinyvlm.losses import decode
from bench.tinyvlm.model import NUM_VISION, to_model_pixels, vision_features
from bench.tinyvlm.pages import DISTRACTOR_SHARE, Pages, Split, make_pages
from bench.tinyvlm.questions import Turn, ask

MIX = {"value": 0.4, "exists": 0.2, "count": 0.2, "list": 0.2}  # half and more local, the rest global
ROWS = 100  # samples in one forward


@dataclass(frozen=True)
class Samples:
    """Pages with one question each.

    Attributes:
        pages, turns: what is asked about what.
        text: ``(B, T)`` question and answer tokens, padded on the right.
        labels: ``(B, T)`` answer tokens where they stand in ``text``, else -100.
        question: ``(B, T)`` bool, True on question tokens.
    """

    pages: Pages
    turns: list[Turn]
    text: torch.Tensor
    labels: torch.Tensor
    question: torch.Tensor

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def kinds(self) -> np.ndarray:
        return np.array([turn.kind for turn in self.turns])


def make_samples(
    split: Split,
    count: int,
    *,
    seed: int = 0,
    mix: dict[str, float] = MIX,
    entries: tuple[int, int] = (4, 12),
    distractors: float = DISTRACTOR_SHARE,
) -> Samples:
    """``count`` pages of ``split`` with one question each. The same arguments give the same samples."""
    pages = make_pages([seed, 10], count, split, entries, distractors=distractors)
    rng = np.random.default_rng([seed, 11])
    kinds = rng.choice(list(mix), count, p=np.array(list(mix.values())) / sum(mix.values()))
    turns = [ask(rng, layout, str(kind)) for layout, kind in zip(pages.layouts, kinds, strict=True)]
    return padded(pages, turns, [turn_ids(turn) for turn in turns])


def padded(pages: Any, turns: list[Turn], rows: Sequence[tuple[list[int], list[int]]]) -> Samples:
    """Samples of ``rows``, the tokens of every question and of its answer; ``pages`` has ``pixels``, one of each."""
    count = len(rows)
    length = max(len(question) + len(answer) for question, answer in rows)
    text = torch.full((count, length), PAD)
    labels = torch.full((count, length), IGNORED)
    asked = torch.zeros(count, length, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        text[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
        asked[row, : len(question)] = True
    return Samples(pages, turns, text, labels, asked)


@torch.no_grad()
def features(model: Any, samples: Samples) -> torch.Tensor:
    """``(B, 144, D)`` vision tokens of every page."""
    pixels = samples.pages.pixels
    return torch.cat([vision_features(model, to_model_pixels(part)) for part in _parts(pixels)])


@torch.no_grad()
def exact_match(
    model: Any, samples: Samples, vision: torch.Tensor | None = None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """``(B,)`` bool: is the whole answer right?

    Args:
        vision: `features` of the samples, computed where missing.
        keep: ``(B, 144)`` bool, the vision tokens that stay (the others are removed at kept positions,
            which equals masking them in every layer); None keeps all.
    """
    vision = features(model, samples) if vision is None else vision
    keep = torch.ones(vision.shape[:2], dtype=torch.bool) if keep is None else keep
    right = [
        _right(model, samples.text[rows], samples.labels[rows], vision[rows], keep[rows])
        for rows in torch.arange(len(samples)).split(ROWS)
    ]
    return torch.cat(right)


def _right(
    model: Any, text: torch.Tensor, labels: torch.Tensor, vision: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """``(B,)`` bool. Tokens beyond the fullest row's number are removed; in the other rows the rest is masked."""
    width = int(keep.sum(1).max())
    index = keep.sort(dim=1, descending=True, stable=True).indices[:, :width].sort(dim=1).values  # (B, K)
    length = int((labels >= 0).any(0).nonzero().max()) + 1  # answers of other kinds may be longer
    begin = model.get_input_embeddings()(torch.full((len(text), 1), BOS))
    rows = vision.gather(1, index[..., None].expand(-1, -1, vision.shape[-1]))
    hidden = torch.cat([begin, rows, model.get_input_embeddings()(text[:, :length])], 1)
    after = torch.arange(1 + NUM_VISION, 1 + NUM_VISION + length).expand(len(text), -1)
    positions = torch.cat([torch.zeros(len(text), 1, dtype=torch.int64), 1 + index, after], 1)
    seen = torch.ones(hidden.shape[:2], dtype=torch.bool)
    seen[:, 1 : 1 + width] = keep.gather(1, index)
    hidden, _ = decode(model, hidden, positions, seen[:, None])
    predicted = model.lm_head(hidden[:, width:-1]).argmax(-1)
    labels = labels[:, :length]
    return ((predicted == labels) | (labels == IGNORED)).all(-1)


def exact_match_by_kind(model: Any, samples: Samples, **kept: Any) -> dict[str, float]:
    """Exact match overall (``"all"``) and by kind of question."""
    right, kinds = exact_match(model, samples, **kept).numpy(), samples.kinds
    return {"all": float(right.mean())} | {
        str(kind): float(right[kinds == kind].mean()) for kind in dict.fromkeys(sorted(kinds))
    }


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[start : start + ROWS] for start in range(0, len(pixels), ROWS)]


__all__ = ["MIX", "Samples", "exact_match", "exact_match_by_kind", "features", "make_samples", "padded"]
