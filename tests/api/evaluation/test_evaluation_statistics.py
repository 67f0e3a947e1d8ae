"""Standard errors and p-values beside formulas that are written out in loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from asymvlm.evaluation import statistics
from asymvlm.evaluation.statistics import Parts, estimate, mcnemar, p_value, paired


def mean_of(*scores: float) -> Parts:
    return Parts(np.array(scores, dtype=np.float64), np.ones(len(scores)))


def exchanged(first: Parts, second: Parts) -> float:
    """Every exchange of the two sides, unit by unit."""
    ones, twos = ([*zip(parts.numerator, parts.denominator)] for parts in (first, second))

    def ratio(pairs: list[tuple[float, float]]) -> float:
        below = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / below if below else 0.0

    wanted, found = abs(ratio(ones) - ratio(twos)), []
    for swaps in itertools.product((False, True), repeat=len(ones)):
        left = [two if swap else one for swap, one, two in zip(swaps, ones, twos)]
        right = [one if swap else two for swap, one, two in zip(swaps, ones, twos)]
        found.append(abs(ratio(left) - ratio(right)) >= wanted - 1e-12)
    return sum(found) / len(found)


def test_a_mean_and_its_standard_error():
    found = estimate(mean_of(1, 0, 0, 1, 1))
    assert found.value == pytest.approx(0.6)
    assert found.error == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / math.sqrt(5))
    assert estimate(mean_of(1)).error is None, "one unit says nothing of the spread"


def test_the_error_of_a_ratio_is_the_spread_of_the_ratio():
    random = np.random.default_rng(0)
    draws = random.integers(0, 2, (2000, 400)), random.random((2000, 400)) < 0.7
    values = []
    for truth, right in zip(*draws):
        found = np.where(right, truth, 1 - truth)
        parts = Parts(2.0 * (found & truth), 1.0 * found + truth)
        values.append(parts.value)
    assert estimate(parts).error == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.parametrize(
    "first,second",
    [
        (mean_of(1, 1, 0, 1, 1, 0), mean_of(0, 1, 0, 0, 0, 1)),
        (mean_of(0.8, 0.5, 0, 1, 0.6), mean_of(0, 0.5, 0.7, 0.9, 0)),
        (
            Parts(np.array([2.0, 0, 2, 0, 2]), np.array([2.0, 1, 2, 0, 2])),
            Parts(np.zeros(5), np.array([1.0, 2, 1, 1, 1])),
        ),
    ],
    ids=["right or wrong", "partial scores", "F1"],
)
def test_p_values_count_every_exchange(first: Parts, second: Parts):
    assert p_value(first, second) == pytest.approx(exchanged(first, second))
    found, reverse = paired(first, second), paired(second, first)
    assert found.difference == pytest.approx(first.value - second.value) == -reverse.difference
    assert (found.better, found.worse) == (reverse.worse, reverse.better)
    assert found.p_value == reverse.p_value


def test_many_partial_scores_are_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(1)
    first, second = (mean_of(*random.random(11)) for _ in range(2))
    exact = p_value(first, second)
    monkeypatch.setattr(statistics, "ALL_SIGNS", 3)
    assert p_value(first, second) == p_value(first, second, seed=0)
    assert p_value(first, second) != p_value(first, second, seed=7)
    assert p_value(first, second) == pytest.approx(exact, abs=0.02)


def test_equal_settings_and_single_units():
    same = paired(mean_of(1, 0), mean_of(1, 0))
    assert (same.difference, same.p_value, same.better, same.worse) == (0, 1, 0, 0)
    assert paired(mean_of(1), mean_of(0)).error is None
    with pytest.raises(ValueError, match="the same units, got 2 and 1"):
        paired(mean_of(1, 0), mean_of(1))


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(3, 0) == 2 / 2**3
    assert mcnemar(2, 5) == pytest.approx(2 * sum(math.comb(7, k) for k in range(3)) / 2**7)
    assert mcnemar(4, 4) == 1
