"""Which samples a pruned model answers rightly: all figures come from `asymvlm.patch`, as a user's would.

Answers are judged by teacher forcing, which equals greedy decoding for exact match (see `bench.tinyvlm.evaluate`);
their tokens carry labels, so that no method scores against them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import asymvlm
from asymvlm import PruningReport, VisionPruning
from asymvlm.prompt.columns import marked_columns
from bench.quality.scorers import model_inputs
from bench.tinyvlm.evaluate import ROWS, Samples
from bench.tinyvlm.model import NUM_VISION

IMAGE = slice(1, 1 + NUM_VISION)  # columns of the vision tokens: begin-of-text stands before them


@dataclass(frozen=True)
class GivenCounts:
    """A budget that gives each row of a batch a number of its own, whatever the scores are.

    Args:
        given: ``(B,)`` int64 numbers of tokens, in the order of the rows.
    """

    given: torch.Tensor
    max_ratio: float = 1.0

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.given.to(torch.int32)


@dataclass(frozen=True)
class Answers:
    """What a pruned model made of n samples.

    Attributes:
        right: ``(n,)`` bool.
        reports: what the library says of each batch.
    """

    right: torch.Tensor
    reports: Sequence[PruningReport]

    @property
    def counts(self) -> torch.Tensor:
        """``(n,)`` int64: vision tokens that stayed."""
        return torch.cat([report.counts.long() for report in self.reports])

    @property
    def gaps(self) -> torch.Tensor:
        """``(n,)`` fp32."""
        return torch.cat([report.gaps for report in self.reports])

    @property
    def scores(self) -> torch.Tensor:
        """``(n, 144)`` fp32. The model must have been pruned."""
        return torch.cat([report.scores[:, IMAGE] for report in self.reports if report.scores is not None])

    @property
    def kept(self) -> torch.Tensor:
        """``(n, 144)`` bool: vision tokens that stayed."""
        return torch.cat([_kept(report) for report in self.reports])


@contextlib.contextmanager
def tower_runs_once(model: Any) -> Iterator[None]:
    """Inside, the tower looks at each tensor of pixels once: nothing that is compared there changes what it sees."""
    composite, known = model.model, {}
    look = composite.get_image_features

    def remembered(pixel_values: torch.Tensor, **options: Any) -> Any:
        place = (pixel_values.data_ptr(), pixel_values.shape)
        if place not in known:
            known[place] = pixel_values, look(pixel_values=pixel_values, **options)  # held, so that no other lies there
        return known[place][1]

    composite.get_image_features = remembered
    try:
        yield
    finally:
        del composite.get_image_features


def prepared(samples: Samples) -> list[dict[str, torch.Tensor]]:
    """The batches of `answers`, to be asked more than once."""
    return [model_inputs(samples, rows.tolist()) for rows in torch.arange(len(samples)).split(ROWS)]


@torch.inference_mode()
def answers(
    model: Any,
    samples: Samples,
    vision: VisionPruning,
    counts: torch.Tensor | None = None,
    batches: Sequence[dict[str, Any]] | None = None,
) -> Answers:
    """Answer all ``samples`` under ``vision``, `ROWS` of them at a time.

    Args:
        counts: ``(n,)`` int64 numbers of vision tokens to keep, in place of the budget of ``vision``.
        batches: of the samples, `prepared`.
    """
    right, reports = [], []
    with asymvlm.patch(model, vision=vision, logits="original") as handle:
        for number, rows in enumerate(torch.arange(len(samples)).split(ROWS)):
            if counts is not None:
                handle.vision = dataclasses.replace(vision, budget=GivenCounts(counts[rows]))
            inputs = model_inputs(samples, rows.tolist()) if batches is None else batches[number]
            predicted = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
            labels = inputs["labels"][:, 1:]
            right.append(((predicted == labels) | (labels < 0)).all(1))
            assert handle.last is not None
            reports.append(handle.last)
    return Answers(torch.cat(right), reports)


def _kept(report: PruningReport) -> torch.Tensor:
    return marked_columns(report.index, report.columns_before)[:, IMAGE]


__all__ = ["Answers", "GivenCounts", "answers", "prepared", "tower_runs_once"]
