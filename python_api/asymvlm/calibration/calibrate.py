"""`calibrate_budget`: choose how many tokens each sample keeps, so that the task metric is best at a given average.

The metric is measured at a ladder of keep ratios, once; all candidates of a method are fitted to that table, and the
best few are then measured for real, beside a uniform budget. Source: section 3.3 and appendix D of arXiv:2605.29535;
the sign of the slope, the target after clamping and the relative threshold are ours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.calibration import fit
from asymvlm.calibration.measure import Measurer, Metric
from asymvlm.settings.budget_file import AnyBudget, budget_to_dict
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.scorer import GapStatistics, Scorer
from asymvlm.settings.suitable import USUAL
from asymvlm.tokens.user_turns import UserTurns
from asymvlm.training.progress import progress_bar
from asymvlm_kernels import Spread, UniformBudget, importance_gap
from asymvlm_kernels.budget import budget_counts

logger = logging.getLogger(__name__)
METHODS = ("threshold", "linear", "relative")
SAME_GAP = 1e-6  # gaps that are no further apart tell no samples apart
RUNGS = 8  # keep ratios of the default ladder


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome of `calibrate_budget`. Averages are mean kept shares of the calibration rows, measured."""

    method: str
    budget: AnyBudget
    scorer: Scorer  # the scorer given, with this budget and the gaps of these samples
    average: float  # kept on average, from counts
    metric: float  # under the budget
    uniform_metric: float  # of a uniform budget at the wanted average
    difference: float  # metric - uniform_metric
    difference_error: float  # standard error of the paired difference
    samples: int  # rows
    ladder: list[dict[str, float]]  # the metric at each keep ratio of the ladder
    table: list[dict[str, Any]]  # measured finalists, best first: budget, average, predicted and measured metric

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["scorer"]
        return values | {"budget": budget_to_dict(self.budget)}


def calibrate_budget(
    model: nn.Module,
    scorer: Scorer | torch.Tensor | str | Path | None,
    samples: Sequence[Mapping[str, Any]],
    metric: Metric,
    average: float = 0.65,
    method: str = "threshold",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    ratios: Sequence[float] | None = None,
    finalists: int = 3,
    text: str | UserTurns = "all",
    processor: Any = None,
    spread: Spread | None = None,
    background: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit a budget for a model and its learned weight.

    Args:
        model: a supported Hugging Face vision-language model, not patched. It comes back as it was.
        scorer: a `Scorer`, its folder, a ``(D,)`` weight, or None for cosine similarity.
        samples: model inputs as `train_scorer` takes them, of one row or a batch; other entries are for the metric.
            Neither samples the weight was trained on nor those it is judged by.
        metric: ``metric(model, sample)``, called with the model pruned: a number, or one for each row; more is better.
            Where a sample has ``labels`` or a ``text_mask``, the model is to be called with inputs of that shape.
        average: share of the vision tokens to keep, mean over the rows.
        method: ``"threshold"`` (Method A), ``"linear"`` (Method B) or ``"relative"`` (`RelativeThresholdBudget`).
        minimum, maximum: lowest and highest keep ratio; None means the paper's 0.3 and 0.95, with room around
            ``average``, or 0.05 and 1 for ``"relative"``, whose other clamps are then tried too.
        ratios: the ladder to measure; None means 8 steps from minimum to maximum. ``average`` is always measured.
        finalists: candidates that are measured for real.
        text, processor: what vision is scored against, as in `VisionPruning`.
        spread: as in `VisionPruning`. A budget belongs to the scores it was fitted to: with others it keeps another
            share, so the scorer remembers, and `VisionPruning` warns where it is used otherwise.
        background: as in `VisionPruning`, and remembered likewise. ``average`` counts these tokens in; ``minimum``,
            ``maximum`` and ``ratios`` are shares of the others.
        checkpoint: folder that keeps every measurement, so that an interrupted run goes on.
        progress: show a bar on stderr.
    Returns:
        `Calibration`. A budget that measures below a uniform one is returned all the same, with a warning.
    Raises:
        ValueError: naming the value found and the value wanted.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if len(samples) == 0:
        raise ValueError("calibrate_budget needs samples, got none")
    lowest, highest, bounds = _bounds(method, average, minimum, maximum)
    steps = len(_ladder(ratios, average, lowest, highest))
    learned = _scorer(model, scorer).replace(budget=None, calibration={})  # both are about to be made
    policy = VisionPruning(learned, text=text, processor=processor, spread=spread, background=background)
    policy.check_model(model)
    assert isinstance(policy.scorer, Scorer)
    turns = policy.text if isinstance(policy.text, UserTurns) else None
    folder = None if checkpoint is None else Path(checkpoint)
    measurer = Measurer(model, policy.scorer, samples, metric, turns, folder, policy.spread, background)
    total = len(samples) * (1 + steps + finalists)
    with progress_bar("calibrating budget", total, shown=progress) as advance:
        for _ in measurer.look():
            advance("scores")
        if not measurer.rows.scores:
            raise ValueError("no sample has vision tokens to prune and text to score them against")
        scores, mask = measurer.rows.padded()
        gaps, num_tokens = importance_gap(scores, mask), measurer.rows.num_tokens
        _check_gaps(method, gaps, average)
        ruled = _beside(background, num_tokens, average, lowest)
        ladder = _ladder(ratios, ruled, lowest, highest)

        def measure(budget: AnyBudget, name: str) -> torch.Tensor:
            values: list[float] = []
            for found in measurer.measure(budget):
                values += found
                advance(name)
            return torch.tensor(values, dtype=torch.float64)

        columns = [measure(UniformBudget(ratio), f"keep {ratio:.3g}") for ratio in ladder]
        table = fit.Table(torch.tensor(ladder, dtype=torch.float64), torch.stack(columns, 1), gaps, num_tokens)
        candidates = _candidates(method, table, scores, mask, ruled, lowest, highest, bounds)
        chosen = _apart(candidates)[:finalists]
        measured = [measure(candidate.budget, f"finalist {i + 1}") for i, candidate in enumerate(chosen)]

    def kept(budget: AnyBudget) -> float:
        counts = budget_counts(budget, scores, gaps, mask).double()
        return float(((counts + background) / (num_tokens + background)).mean())

    uniform = columns[ladder.index(ruled)]
    order = sorted(range(len(chosen)), key=lambda i: (-float(measured[i].mean()), kept(chosen[i].budget)))
    best = order[0]
    difference = measured[best] - uniform
    result = Calibration(
        method=method,
        budget=chosen[best].budget,
        scorer=policy.scorer,
        average=kept(chosen[best].budget),
        metric=float(measured[best].mean()),
        uniform_metric=float(uniform.mean()),
        difference=float(difference.mean()),
        difference_error=float(difference.std(correction=0)) / math.sqrt(len(difference)),
        samples=len(difference),
        ladder=[
            {"keep_ratio": ratio, "average": kept(UniformBudget(ratio)), "metric": float(column.mean())}
            for ratio, column in zip(ladder, columns, strict=True)
        ],
        table=[
            {
                "budget": budget_to_dict(chosen[i].budget),
                "average": kept(chosen[i].budget),
                "predicted": chosen[i].predicted,
                "metric": float(measured[i].mean()),
            }
            for i in order
        ],
    )
    if result.difference < 0:
        logger.warning(
            "the best %s budget measures %.4g, below %.4g of a uniform one at the same average",
            method,
            result.metric,
            result.uniform_metric,
        )
    record = {name: value for name, value in result.to_dict().items() if name != "budget"} | {"wanted": average}
    record["spread"] = None if spread is None else dataclasses.asdict(spread)
    record["background"] = background
    record[USUAL] = sorted(measurer.rows.relevant)[math.ceil(len(measurer.rows.relevant) * 0.95) - 1]
    owner = policy.scorer.replace(budget=result.budget, gaps=GapStatistics.of(gaps), calibration=record)
    return dataclasses.replace(result, scorer=owner)


def _check_gaps(method: str, gaps: torch.Tensor, average: float) -> None:
    """Before anything is measured: a budget that goes by the gap needs gaps that differ.

    Raises:
        ValueError: if they do not, or there is one alone.
    """
    if len(gaps) < 2:
        raise ValueError("calibrate_budget needs two usable samples or more to compare, got 1")
    if method != "relative" and float(gaps.max() - gaps.min()) <= SAME_GAP:
        raise ValueError(
            f"the {len(gaps)} samples have one importance gap, {float(gaps[0]):.4g}, by which method {method!r} cannot "
            f"tell them apart: take a uniform budget of {average:g}, or method 'relative', which reads the scores"
        )


def _scorer(model: nn.Module, scorer: Scorer | torch.Tensor | str | Path | None) -> Scorer:
    """Any way to name a weight as a `Scorer`; a bare weight is taken to be this model's."""
    from asymvlm.settings.identity import identify

    if isinstance(scorer, (str, Path)):
        return Scorer.from_pretrained(scorer)
    if isinstance(scorer, Scorer):
        return scorer
    base = identify(model)
    return Scorer(torch.ones(base.width) if scorer is None else scorer, base)


def _bounds(
    method: str, average: float, minimum: float | None, maximum: float | None
) -> tuple[float, float, list[tuple[float, float]]]:
    """Lowest and highest ratio, and the clamps that ``"relative"`` tries."""
    if not isinstance(average, (int, float)) or not 0 < average < 1:
        raise ValueError(f"average must be in (0, 1), got {average!r}")
    relative = method == "relative"
    lowest = (0.05 if relative else min(0.3, average / 2)) if minimum is None else minimum
    highest = (1.0 if relative else max(0.95, (1 + average) / 2)) if maximum is None else maximum
    if not 0 < lowest < average < highest <= 1:
        raise ValueError(f"minimum < average < maximum must hold within (0, 1], got {lowest}, {average} and {highest}")
    if minimum is not None and maximum is not None:
        return lowest, highest, [(lowest, highest)]
    lows = [lowest] if minimum is not None else [low for low in (lowest, average / 4, average / 2) if low >= lowest]
    highs = [highest] if maximum is not None else [highest, min(1.0, 2 * average)]
    return lowest, highest, sorted({(low, high) for low in lows for high in highs if low < average < high})


def _beside(background: int, num_tokens: torch.Tensor, average: float, lowest: float) -> float:
    """The average share that a budget may keep of the other tokens, where ``background`` ones of a sample stay anyway.

    Raises:
        ValueError: if these alone leave it no more than its minimum.
    """
    if not background:
        return average
    kept = float((background / (num_tokens + background).double()).mean())
    ruled = (average - kept) / (1 - kept)
    if ruled <= lowest:
        raise ValueError(
            f"{background} background tokens are {kept:.3g} of the tokens: average must exceed "
            f"{kept + lowest * (1 - kept):.3g}, got {average}"
        )
    return ruled


def _ladder(ratios: Sequence[float] | None, average: float, lowest: float, highest: float) -> list[float]:
    if ratios is None:
        step = (highest - lowest) / (RUNGS - 1)
        ratios = [round(lowest + step * i, 3) for i in range(RUNGS)]
        ratios = [ratio for ratio in ratios if abs(ratio - average) > step / 4]
    ladder = sorted({*map(float, ratios), average})
    if len(ladder) < 3 or not all(0 < ratio <= 1 for ratio in ladder):
        raise ValueError(f"ratios must be three or more in (0, 1], the average among them, got {ladder}")
    return ladder


def _candidates(
    method: str,
    table: fit.Table,
    scores: torch.Tensor,
    mask: torch.Tensor,
    average: float,
    lowest: float,
    highest: float,
    bounds: list[tuple[float, float]],
) -> list[fit.Candidate]:
    if method == "linear":
        return fit.linear_candidates(table, average, lowest, highest)
    if method == "relative":
        return fit.relative_candidates(table, scores, mask, average, bounds)
    found = fit.threshold_candidates(table, average)
    if not found:
        raise ValueError(
            f"no thresholds fit an average of {average} with the ratios {table.ratios.tolist()}: measure lower ones"
        )
    return found


def _apart(candidates: list[fit.Candidate]) -> list[fit.Candidate]:
    """Without candidates that predict the same as a better one: finalists should differ."""
    seen: set[tuple[float, float]] = set()
    kept = []
    for candidate in candidates:
        key = (round(candidate.predicted, 6), round(candidate.average, 4))
        if key not in seen:
            seen.add(key)
            kept.append(candidate)
    return kept


__all__ = ["Calibration", "calibrate_budget"]
