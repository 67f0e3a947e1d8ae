"""Which vision tokens are pruned, and how: plain settings, checked when they are made."""

from __future__ import annotations

import logging
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.methods import AsymVLM, BeforeMethod, InsideMethod, SelectingMethod, find_method
from asymvlm.settings.numbers import check_count
from asymvlm.settings.recall import Recall, as_recall, check_recall
from asymvlm.settings.scorer import Scorer
from asymvlm.settings.suitable import check_background, check_calibrated, check_inside, check_scored, usual_share
from asymvlm.settings.weights import fp32_weight
from asymvlm.tokens.user_turns import UserTurns
from asymvlm_kernels import AtLeastRelevant, Budget, ScoreBudget, Spread, UniformBudget

logger = logging.getLogger(__name__)
POSITIONS = ("keep", "compact")


@dataclass(frozen=True, eq=False)
class VisionPruning:
    """Remove vision tokens before prefill.

    Args:
        scorer: the learned weight: a `Scorer`, the folder or hub id of one, or a bare ``(D,)`` fp32 tensor; None means
            ones, which is cosine similarity. A `Scorer` is refused by a model it was not trained for.
        budget: keep ratio of each sample. ``UniformBudget(1.0)`` leaves the model alone, bit for bit. None means the
            scorer's own, the method's (an `InsideMethod` with a budget takes no other), or half the tokens.
        text: which tokens vision is scored against: ``"all"`` real tokens that are not vision; ``"user"``, the words of
            the user's turns, without special and template tokens, which `UserTurns` finds; or a ``(B, S)`` bool mask
            for calls of exactly that shape.
        processor: for ``text="user"``, the processor or tokenizer that makes the prompts. Not kept.
        positions: ``"keep"`` leaves survivors at their original positions, so that pruning equals masking;
            ``"compact"`` renumbers them from 0 (one-dimensional, as paged engines do), an `InsideMethod` in each layer.
        per_image: rank every image of a sample by itself instead of all together.
        spread: hand scores on to neighbours on the same line of an image; None scores every token by itself.
        method: which tokens stay: a `BeforeMethod`, an `InsideMethod`, or the name of one (``"random"``,
            ``"vispruner"``, ``"fastv"``, one of an installed package; `asymvlm.methods.available_methods` lists them).
            None means `AsymVLM` with the ``scorer``.
        at_least_relevant: where unusually many tokens look relevant, keep all of those, whatever the budget says. True:
            unusual is what the scorer's calibration says, where the budget is the one that it fitted; else any number
            above the budget's.
        background: so many tokens that resemble the question least stay beside those of the budget, which rules over
            the others: a decoder rests attention on tokens that say nothing, and a budget that keeps nothing but what
            is relevant takes them all away. 4 where few tokens stay. Scoring is then a step of its own.
        recall: keep what is dropped beside the cache: a question of a later ``generate`` brings back what it ranks into
            the budget. True means ``Recall()``, ``"host"`` the same from host memory. False becomes None.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    scorer: Scorer | torch.Tensor | str | Path | None = None
    budget: Budget | ScoreBudget = None  # type: ignore[assignment]  # a Budget once made
    text: str | UserTurns | torch.Tensor = "all"
    positions: str = "keep"
    per_image: bool = False
    spread: Spread | None = None
    processor: InitVar[Any] = None
    method: BeforeMethod | InsideMethod | str | None = None
    at_least_relevant: bool | AtLeastRelevant = False
    recall: bool | str | Recall | None = False
    background: int = 0

    def __post_init__(self, processor: Any) -> None:
        method = None if self.method is None else find_method(self.method, BeforeMethod, InsideMethod)
        if method is not None and self.scorer is not None:
            raise ValueError(f"scorer is that of the method 'asymvlm': pass it or another method, got {method!r} too")
        if isinstance(method, AsymVLM):
            object.__setattr__(self, "scorer", method.scorer)
            method = None
        object.__setattr__(self, "method", method)
        if isinstance(self.scorer, (str, Path)):
            object.__setattr__(self, "scorer", Scorer.from_pretrained(self.scorer))
        if isinstance(self.scorer, torch.Tensor):
            if self.scorer.ndim != 1 or self.scorer.dtype != torch.float32:
                raise ValueError(
                    f"scorer must be a (D,) float32 tensor, got {tuple(self.scorer.shape)} {self.scorer.dtype}"
                )
            fp32_weight("scorer", self.scorer)
        elif self.scorer is not None and not isinstance(self.scorer, Scorer):
            raise ValueError(f"scorer must be a Scorer, its folder, a (D,) float32 tensor or None, got {self.scorer!r}")
        if isinstance(method, InsideMethod):
            check_inside(method, self.budget, self.spread)
            object.__setattr__(self, "budget", method.budget if self.budget is None else self.budget)
        if self.budget is None:
            own = self.scorer.budget if isinstance(self.scorer, Scorer) else getattr(method, "budget", None)
            object.__setattr__(self, "budget", UniformBudget(0.5) if own is None else own)
        if not isinstance(self.budget, (Budget, ScoreBudget)):
            raise ValueError(f"budget must be one like UniformBudget(0.5), got {self.budget!r}")
        if isinstance(self.text, torch.Tensor):
            if self.text.ndim != 2 or self.text.dtype != torch.bool:
                raise ValueError(f"text must be a (B, S) bool mask, got {tuple(self.text.shape)} {self.text.dtype}")
        elif self.text == "user":
            if processor is None:
                raise ValueError(
                    "text='user' needs processor=..., whose chat template tells the user's turns, got None"
                )
            object.__setattr__(self, "text", UserTurns.of(processor))
        elif self.text != "all" and not isinstance(self.text, UserTurns):
            raise ValueError(f"text must be 'all', 'user', UserTurns or a (B, S) bool mask, got {self.text!r}")
        if self.spread is not None and not isinstance(self.spread, Spread):
            raise ValueError(f"spread must be None or Spread(reach=4, share=0.7), got {self.spread!r}")
        check_count("background", self.background, 0)
        check_scored(self.scored_by, self.spread, self.per_image, self.at_least_relevant)
        check_background(self.scored_by, self.background)
        trained = self.scorer.training.get("text") if isinstance(self.scorer, Scorer) else None
        used = None if isinstance(self.text, torch.Tensor) else "user" if isinstance(self.text, UserTurns) else "all"
        if trained is not None and used is not None and trained != used:
            logger.warning("the scorer was trained with text=%r and is used with text=%r: scores differ", trained, used)
        check_calibrated(self.scorer, self.budget, self.spread, self.background)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be 'keep' or 'compact', got {self.positions!r}")
        object.__setattr__(self, "recall", as_recall(self.recall))
        check_recall(self)

    @property
    def inside(self) -> InsideMethod | None:
        """The method, where it works between the layers of the decoder and has something to drop."""
        return self.method if isinstance(self.method, InsideMethod) and not self.bypassed else None

    @property
    def scored_by(self) -> BeforeMethod | InsideMethod:
        """The method in effect."""
        assert not isinstance(self.method, str)
        return AsymVLM(self.scorer) if self.method is None else self.method

    @property
    def relevance(self) -> AtLeastRelevant | None:
        """How tokens that look relevant are counted; None where scores say nothing about the question."""
        if isinstance(self.at_least_relevant, AtLeastRelevant):
            return self.at_least_relevant
        method = self.scored_by
        if not isinstance(method, BeforeMethod) or isinstance(method, SelectingMethod) or not method.needs_text:
            return None
        return AtLeastRelevant(usual=usual_share(self.scorer, self.budget))

    @property
    def bypassed(self) -> bool:
        """True when nothing can be dropped, so the model is called untouched."""
        return isinstance(self.budget, UniformBudget) and self.budget.ratio == 1

    @property
    def weight(self) -> torch.Tensor | None:
        """The learned weight, ``(D,)`` fp32; None where there is none."""
        return self.scorer.weight if isinstance(self.scorer, Scorer) else self.scorer  # type: ignore[return-value]

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the scorer does not belong to.

        Raises:
            ValueError: naming what was found and what was wanted.
        """
        if isinstance(self.scorer, Scorer):
            self.scorer.check_model(model)
        elif self.weight is not None:
            config: Any = model.config
            width = config.get_text_config().hidden_size
            if self.weight.shape != (width,):
                raise ValueError(f"the scorer must have the model's width ({width},), got {tuple(self.weight.shape)}")


def as_vision(vision: VisionPruning | float | None, keep: float | None) -> VisionPruning | None:
    """What a caller gave for vision pruning, as settings; a number is a keep ratio.

    Raises:
        TypeError: for anything else, or both.
    """
    if keep is not None:
        if vision is not None:
            raise TypeError(f"pass vision or keep, got both: {vision!r} and {keep!r}")
        vision = keep
    if vision is None or isinstance(vision, VisionPruning):
        return vision
    if isinstance(vision, bool) or not isinstance(vision, (int, float)):
        raise TypeError(f"vision must be VisionPruning(...) or a keep ratio such as 0.5, got {vision!r}")
    return VisionPruning(budget=UniformBudget(float(vision)))
