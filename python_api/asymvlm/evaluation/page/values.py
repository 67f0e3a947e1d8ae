"""How values of a metric are told: those of the library's own metrics in percent, those of a caller's as they are."""

from __future__ import annotations

from asymvlm.evaluation.metrics import METRICS


def unit(metric: str) -> str:
    """What follows the name of a metric in a heading or on an axis."""
    return ", percent" if metric in METRICS else ""


def scaled(metric: str, number: float) -> float:
    """A value, a difference or an error as it is told."""
    return number * (100 if metric in METRICS else 1)


def in_words(metric: str, number: float, error: float | None, sign: str = "") -> str:
    """A value or a difference with its standard error; ``sign="+"`` for a difference."""
    form = ".1f" if metric in METRICS else ".4g"
    told = f"{scaled(metric, number):{sign}{form}}".replace("-", "−")
    return told if error is None else f"{told} ± {scaled(metric, error):{form}}"


__all__ = ["in_words", "scaled", "unit"]
