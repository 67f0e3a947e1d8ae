"""Ideas beyond the paper, measured against the paper's scorer where there is most to win: keep 0.25 and 0.15.

Every variant is one change. Learned ones were trained on the same pages with `train_scorer`; the others only treat the
scores differently. What was chosen by looking (reach and share of the spreading) was chosen on validation pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from asymvlm_kernels import Spread, UniformBudget
from bench.quality.selection import kept_tokens, similarity
from bench.quality.study import Study, key
from bench.tinyvlm.pages import GRID

RATIOS = (0.5, 0.25, 0.15)
SPREAD = Spread(reach=4, share=0.7)
Change = Callable[[torch.Tensor], torch.Tensor]


def lines(count: int) -> torch.Tensor:
    """``(count, 144)``: the line of cells that each vision token belongs to."""
    return torch.arange(GRID).repeat_interleave(GRID).expand(count, -1)


def spread(scores: torch.Tensor) -> torch.Tensor:
    """A token next to one that matters matters too: the digits of a value do not resemble the key that is asked for."""
    return SPREAD.apply(scores, lines(len(scores)))


def centred(study: Study) -> torch.Tensor:
    """Cosine after the page's mean vision token is taken off: what all tokens share says nothing."""
    return similarity(study.model, study.samples, study.vision - study.vision.mean(1, keepdim=True))


def beyond(
    study: Study,
    baseline: str,
    learned: Mapping[str, Sequence[torch.Tensor]],
    ratios: Sequence[float] = RATIOS,
) -> dict[str, Any]:
    """Rates of every variant and its paired difference to the method ``baseline`` of the study."""
    scores: dict[str, list[torch.Tensor]] = {
        name: [similarity(study.model, study.samples, study.vision, weight) for weight in weights]
        for name, weights in learned.items()
    }
    for name in ("cosine", *study.weights):
        scores[f"{name}, spread along lines"] = [spread(run) for run in study.scores(name)]
    scores["cosine, centred"] = [centred(study)]
    for ratio in ratios:
        study.uniform(baseline, ratio)
        for name, runs in scores.items():
            study.measure(key(name, ratio), [kept_tokens(run, UniformBudget(ratio)) for run in runs])
    return {
        "baseline": baseline,
        "spread": {"reach": SPREAD.reach, "share": SPREAD.share},
        "rates": {name: {f"{ratio:g}": study.summary(key(name, ratio)) for ratio in ratios} for name in scores},
        "paired": [study.compare(key(name, ratio), key(baseline, ratio)) for name in scores for ratio in ratios],
    }


__all__ = ["RATIOS", "SPREAD", "beyond"]
