"""Standard errors, and paired comparisons of two settings on the same units, for ratios of sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ALL_SIGNS = 12  # units that differ, up to which all exchanges are tried
DRAWS = 10_000  # exchanges drawn beyond
AT_ONCE = 500  # of them in memory


@dataclass(frozen=True)
class Parts:
    """Numerators and denominators of n units, each ``(n,)`` float64."""

    numerator: np.ndarray
    denominator: np.ndarray

    @property
    def value(self) -> float:
        """The metric; 0 where the denominators vanish."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else 0.0

    @property
    def pulls(self) -> np.ndarray:
        """``(n,)``: how far each unit pulls the metric, by linearisation; of a mean, the distance from it."""
        share = float(self.denominator.mean())
        return (self.numerator - self.value * self.denominator) / share if share else np.zeros(len(self.numerator))


@dataclass(frozen=True)
class Estimate:
    """A metric and its standard error over units; None of a single unit."""

    value: float
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """Difference of two settings on the same units.

    Attributes:
        difference: first minus second.
        error: its standard error; None of a single unit.
        p_value: two-sided, of the settings' answers being exchangeable in each unit. Not corrected for the number of
            comparisons.
        better, worse: units where the first scores more, or less.
    """

    difference: float
    error: float | None
    p_value: float
    better: int
    worse: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(parts: Parts) -> Estimate:
    return Estimate(parts.value, _error(parts.pulls))


def paired(first: Parts, second: Parts, seed: int = 0) -> Paired:
    """Compare two settings on the same units.

    Raises:
        ValueError: if the numbers of units differ.
    """
    if len(first.numerator) != len(second.numerator):
        raise ValueError(
            f"a paired comparison needs the same units, got {len(first.numerator)} and {len(second.numerator)}"
        )
    pulled = first.pulls - second.pulls
    better, worse = _counts(first, second)
    return Paired(first.value - second.value, _error(pulled), p_value(first, second, seed), better, worse)


def p_value(first: Parts, second: Parts, seed: int = 0) -> float:
    """Share of exchanges of the two settings' answers, unit by unit, whose difference is as large as the one found.

    Where all differences have one size (right or wrong), it is the exact McNemar test. Elsewhere all exchanges are
    tried for up to `ALL_SIGNS` differing units; for more, `DRAWS` are drawn from ``seed``, beside the one found.
    """
    moved = (first.numerator != second.numerator) | (first.denominator != second.denominator)
    count = int(moved.sum())
    if not count:
        return 1.0
    halves = (first.numerator - second.numerator)[moved] / 2
    below = (first.denominator - second.denominator)[moved] / 2
    if not below.any() and np.ptp(np.abs(halves)) <= 1e-12 and np.all(first.denominator == 1):
        return mcnemar(int((halves > 0).sum()), int((halves < 0).sum()))
    middle = [float((getattr(first, name) + getattr(second, name)).sum()) / 2 for name in ("numerator", "denominator")]
    found = []
    for signs in _exchanges(count, seed):
        up, down = signs @ halves, signs @ below
        found.append(np.abs(_ratio(middle[0] + up, middle[1] + down) - _ratio(middle[0] - up, middle[1] - down)))
    differences = np.concatenate(found)
    slack = 1e-9 * differences.max()  # sums in another order differ in their last digits
    return float((differences >= differences[0] - slack).mean())


def _exchanges(count: int, seed: int) -> Iterator[np.ndarray]:
    """``(some, count)`` signs, -1 where a unit's answers are exchanged; the first exchanges none."""
    if count <= ALL_SIGNS:
        yield np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return
    yield np.ones((1, count))
    random = np.random.default_rng(seed)
    for start in range(0, DRAWS, AT_ONCE):
        yield 2.0 * random.integers(0, 2, (min(AT_ONCE, DRAWS - start), count), dtype=np.int8) - 1.0


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided probability of a split at least as uneven, if either side were as likely."""
    total, fewer = better + worse, min(better, worse)
    ways = tail = 1  # of none of `total`
    for count in range(fewer):
        ways = ways * (total - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def _counts(first: Parts, second: Parts) -> tuple[int, int]:
    """By what a unit would score by itself; of F1, a right yes against a wrong answer."""
    value = (first.value + second.value) / 2
    gain = (first.numerator - second.numerator) - value * (first.denominator - second.denominator)
    return int((gain > 0).sum()), int((gain < 0).sum())


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _error(pulls: np.ndarray) -> float | None:
    return float(pulls.std(ddof=1) / math.sqrt(len(pulls))) if len(pulls) > 1 else None


__all__ = ["Estimate", "Paired", "Parts", "estimate", "mcnemar", "p_value", "paired"]
