"""Means with standard errors, and paired comparisons of two methods on the same samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rate:
    """Share of right answers. ``error`` is the standard error of the mean over samples."""

    mean: float
    error: float
    samples: int


@dataclass(frozen=True)
class Paired:
    """Difference of two methods, sample by sample.

    Attributes:
        difference: mean of first minus second.
        error: its standard error.
        better, worse: samples where only the first, or only the second, was right.
        p_value: exact two-sided McNemar test; only its two counts matter. 1 where the methods never differ.
    """

    difference: float
    error: float
    better: int
    worse: int
    p_value: float


def rate(right: np.ndarray) -> Rate:
    """``right``: ``(n,)`` bool, or ``(runs, n)``: runs saw the same samples, so a sample counts once, by its mean."""
    values = _by_sample(right)
    return Rate(float(values.mean()), _error(values), len(values))


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare ``(n,)`` or ``(runs, n)`` right answers on the same samples.

    Of several runs a sample's mean counts. The exact test needs a verdict: right where most runs were, and a tie of the
    two sides is no difference.

    Raises:
        ValueError: if the numbers of samples differ.
    """
    one, two = _by_sample(first), _by_sample(second)
    if one.shape != two.shape:
        raise ValueError(f"paired comparison needs the same samples, got {len(one)} and {len(two)}")
    difference = one - two
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return Paired(float(difference.mean()), _error(difference), better, worse, mcnemar(better, worse))


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided probability of a split at least as uneven, if either side were as likely."""
    total, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def record(value: Rate | Paired, digits: int = 4) -> dict[str, float | int]:
    """Plain numbers for JSON; p-values keep three significant digits."""
    return {
        name: float(f"{number:.3g}") if name == "p_value" else round(number, digits)
        for name, number in asdict(value).items()
    }


def rates_by_kind(right: np.ndarray, kinds: np.ndarray, kept: np.ndarray | None = None) -> dict[str, Any]:
    """Records of the rate for each kind of sample, and of the mean share ``kept``; ``(runs, n)``, kinds ``(n,)``."""
    found: dict[str, Any] = {}
    for kind in sorted(set(kinds)):
        found[str(kind)] = record(rate(right[:, kinds == kind]))
        if kept is not None:
            found[str(kind)]["kept"] = round(float(kept[:, kinds == kind].mean()), 4)
    return found


def _by_sample(right: np.ndarray) -> np.ndarray:
    values = np.asarray(right, dtype=np.float64)
    return values.mean(0) if values.ndim == 2 else values


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


__all__ = ["Paired", "Rate", "mcnemar", "paired", "rate", "record"]
