"""Ideas beyond the paper, measured against the paper's scorer where there is most to win, below half of the tokens.

Beside them stand the controls, which see neither page nor question.

Every variant is one change. Learned ones were trained on the same pages with `train_scorer`; the others only treat the
scores differently: spread hands them on, since a token next to one that matters matters too: the digits of a value do
not resemble the key that is asked for. What was chosen by looking (reach and share of the spreading) was chosen on
validation pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from asymvlm import VisionPruning
from asymvlm.methods import AsymVLM, BeforeMethod, VisionPrompt
from asymvlm_kernels import Spread, UniformBudget, score_tokens
from bench.quality.study import CONTROLS, Study, key

RATIOS = (0.5, 0.33, 0.22, 0.11)
SPREAD = Spread(reach=4, share=0.7)


class Centred(BeforeMethod):
    """Cosine after the page's mean vision token is taken off: what all tokens share says nothing."""

    name: ClassVar[str] = "centred"
    needs_text: ClassVar[bool] = True

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        vision = prompt.tokens.prunable[..., None]
        mean = (prompt.embeds * vision).sum(1, keepdim=True) / vision.sum(1, keepdim=True)
        own = prompt.embeds - mean
        return score_tokens(own, prompt.embeds, vision_mask=prompt.tokens.prunable, text_mask=prompt.text)


def beyond(
    study: Study,
    baseline: str,
    learned: Mapping[str, Sequence[torch.Tensor]],
    ratios: Sequence[float] = RATIOS,
) -> dict[str, Any]:
    """Rates of every variant and its paired difference to the method ``baseline`` of the study."""
    plain: dict[str, list[BeforeMethod]] = {
        name: [AsymVLM(weight) for weight in many] for name, many in learned.items()
    }
    spread = {f"{name}, spread along lines": study.runs(name) for name in ("cosine", *study.weights)}
    variants = plain | spread | {"cosine, centred": [Centred()]}
    for ratio in ratios:
        study.uniform(baseline, ratio)
        for name, methods in variants.items():
            budget, how = UniformBudget(ratio), SPREAD if name in spread else None
            runs = [VisionPruning(method=method, budget=budget, spread=how) for method in methods]
            study.measure(key(name, ratio), runs)
        for name in CONTROLS:
            study.uniform(name, ratio)
    rows = (*CONTROLS, *variants)
    return {
        "baseline": baseline,
        "spread": {"reach": SPREAD.reach, "share": SPREAD.share},
        "rates": {name: {f"{ratio:g}": study.summary(key(name, ratio)) for ratio in ratios} for name in rows},
        "paired": [study.compare(key(name, ratio), key(baseline, ratio)) for name in rows for ratio in ratios],
    }


__all__ = ["RATIOS", "SPREAD", "beyond"]
