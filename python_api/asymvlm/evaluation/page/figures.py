"""The plots of a report, from the rows of ``summary.json`` and the lines of ``answers.jsonl``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asymvlm.evaluation.arms import CACHE, COSINE, FULL, keep_in_words
from asymvlm.evaluation.page.svg import Axis, Point, Series, bars, scatter
from asymvlm.evaluation.page.values import in_words, scaled, unit

Row = Mapping[str, Any]
BINS = 20


def methods_of(rows: Sequence[Row]) -> list[str]:
    """Every method once, in order: its place is its colour and shape in all plots."""
    return list(dict.fromkeys(row["method"] for row in rows))


def against_tokens(rows: Sequence[Row], metric: str) -> str:
    """The metric over the tokens that are held: of the vision tokens, or, dashed, of the prompt's in the cache."""
    return _plot(rows, metric, held, Axis(0, 100, [0, 25, 50, 75, 100], "tokens held, percent"))


def against_time(rows: Sequence[Row], metric: str) -> str:
    """The metric over the time to the first token."""
    times = [first_token(row) for row in rows]
    return _plot(rows, metric, first_token, Axis.over(times, "time to first token of a batch, ms", floor=0))


def gaps_of(answers: Sequence[Row]) -> tuple[str, list[float]] | None:
    """A method, and the importance gap that its scores have in each sample; None where no method computes one.

    The method is the one that decides by gaps, else the first that has any: those of random scores say nothing. A gap
    does not depend on the ratio, so that of the first setting stands.
    """
    gaps: dict[str, dict[int, float]] = {}
    for line in answers:
        if line["gap"] is not None:
            gaps.setdefault(line["method"], {}).setdefault(line["sample"], line["gap"])
    method = next((name for name in ("asymvlm", COSINE, *gaps) if name in gaps), None)
    return None if method is None else (method, list(gaps[method].values()))


def of_gaps(method: str, values: Sequence[float]) -> str:
    """How the importance gaps of the samples lie."""
    low, high = min(values), max(values)
    high = high if high > low else low + 1e-3
    width = (high - low) / BINS
    edges = [low + width * place for place in range(BINS)] + [high]
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / width), BINS - 1)] += 1
    x, y = Axis.over([low, high], "importance gap"), Axis.over([0, max(counts)], "samples", floor=0)
    told = (
        f"Histogram of the importance gaps of {len(values)} samples by {method}, median {statistics.median(values):.3g}"
    )
    return bars(edges, counts, x, y, told)


def held(row: Row) -> float:
    """Percent of the tokens that a setting holds."""
    if row["method"].startswith(CACHE):
        return 100 * float(row["keep"])
    return 100 * float(row["average_kept"]) / float(row["vision_tokens"]) if row["vision_tokens"] else 100.0


def first_token(row: Row) -> float:
    return float(row["costs"]["first_token_ms"])


def _plot(rows: Sequence[Row], metric: str, across: Callable[[Row], float], x: Axis) -> str:
    full = next(row for row in rows if row["method"] == FULL)
    series = []
    for place, method in enumerate(methods_of(rows)):
        own = [row for row in rows if row["method"] == method]
        own = sorted(
            own + ([full] if method != FULL else []), key=held
        )  # times waver: a line joins neighbouring ratios
        points = [_point(row, metric, across) for row in own]
        series.append(Series(method, points, place, method.startswith(CACHE)))
    series = series[1:] + series[:1]  # the whole model's point on top
    points = [point for one in series for point in one.points]
    ends = [point.y + sign * (point.error or 0) for point in points for sign in (-1, 1)]
    if unit(metric):  # a bar beyond what can be reached is cut, a value never
        ends = [min(max(end, 0), 100) for end in ends]
    y = Axis.over([*ends, *(point.y for point in points)], f"{metric}{unit(metric)}")
    told = "; ".join(point.about for one in series for point in one.points if point.about.startswith(one.name))
    return scatter(series, x, y, f"{metric} over {x.label}: {told}")


def _point(row: Row, metric: str, across: Callable[[Row], float]) -> Point:
    found, error = row["metrics"][metric]["value"], row["metrics"][metric]["error"]
    name = row["method"] if row["method"] == FULL else f"{row['method']} {keep_in_words(row['keep'])}"
    about = f"{name}: {in_words(metric, found, error)} at {across(row):.4g}"
    return Point(across(row), scaled(metric, found), None if error is None else scaled(metric, error), about)


__all__ = ["against_time", "against_tokens", "first_token", "gaps_of", "held", "methods_of", "of_gaps"]
