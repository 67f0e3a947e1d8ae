"""From single answers to a table: values with standard errors, paired differences, and what it cost."""

from __future__ import annotations

import statistics as simple
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asymvlm.evaluation.arms import FULL
from asymvlm.evaluation.metrics import Metric
from asymvlm.evaluation.record import FORMAT
from asymvlm.evaluation.statistics import Parts, estimate, paired

Line = Mapping[str, Any]
Key = tuple[str, float | str]


def summarise(
    samples: Sequence[Line],
    answers: Sequence[Line],
    costs: Sequence[Line],
    metrics: Sequence[Metric],
    settings: Mapping[str, Any],
    baseline: str | None = None,
) -> dict[str, Any]:
    """The table of a run, from the lines of its files.

    Args:
        settings: of the record: ``arms``, ``skipped``, ``seed``.
        baseline: a method to compare with at equal ratio.
    """
    by_arm: dict[Key, list[Line]] = defaultdict(list)
    costs_of: dict[Key, list[Line]] = defaultdict(list)
    for line in answers:
        by_arm[line["method"], line["keep"]].append(line)
    for line in costs:
        costs_of[line["method"], line["keep"]].append(line)
    parts = {
        metric.name: {arm: parts_of(metric, samples, lines) for arm, lines in by_arm.items()} for metric in metrics
    }
    rows = []
    for arm in ((entry["method"], entry["keep"]) for entry in settings["arms"]):
        lines = by_arm[arm]
        judged = {name: _judged(arm, found, baseline, settings["seed"]) for name, found in parts.items()}
        means = {name: _mean(lines, name) for name in ("kept", "vision_tokens", "average_kept", "new_tokens")}
        head = {"method": arm[0], "keep": arm[1], "samples": len(lines)}
        rows.append({**head, "metrics": judged, **means, "costs": _costs(costs_of[arm], len(lines))})
    return {
        "format": FORMAT,
        "samples": len(samples),
        "metrics": [metric.name for metric in metrics],
        "baseline": baseline,
        "skipped": settings["skipped"],
        "rows": rows,
    }


def parts_of(metric: Metric, samples: Sequence[Line], lines: Sequence[Line]) -> Parts:
    """Numerator and denominator of each unit: a sample, or a group of them in order of first appearance."""
    if metric.parts is not None:
        pairs = [metric.parts(line["answer"], samples[line["sample"]]["answers"]) for line in lines]
        return Parts(*np.array(pairs, dtype=np.float64).T)
    scores = [line["scores"][metric.name] for line in lines]
    if metric.grouped:
        groups: dict[Any, float] = {}
        for line, score in zip(lines, scores, strict=True):
            group = group_of(samples[line["sample"]])
            groups[group] = min(groups.get(group, score), score)
        scores = list(groups.values())
    values = np.array(scores, dtype=np.float64)
    return Parts(values, np.ones(len(values)))


def group_of(sample: Line) -> Any:
    """What a sample counts together with: its group, else its images, else nothing."""
    images = sample["images"]
    return sample["group"] or (tuple(images) if None not in images else sample["sample"])


def _judged(arm: Key, parts: Mapping[Key, Parts], baseline: str | None, seed: int) -> dict[str, Any]:
    found = estimate(parts[arm]).to_dict()
    others: dict[str, Key] = {"to_full": (FULL, 1.0)}
    if baseline is not None:
        others["to_baseline"] = (baseline, arm[1])
    for name, other in others.items():
        if arm[0] not in (FULL, other[0]) and other in parts:
            found[name] = paired(parts[arm], parts[other], seed).to_dict()
    return found


def _costs(lines: Sequence[Line], samples: int) -> dict[str, Any]:
    decoded, spent = sum(line["decoded"] for line in lines), sum(line["decode_ms"] for line in lines)
    held = [line["kv_bytes"] for line in lines]
    peaks = [line["peak_bytes"] for line in lines]
    return {
        "first_token_ms": simple.median(line["first_token_ms"] for line in lines),
        "tokens_per_second": 1000 * decoded / spent if decoded and spent else None,
        "kv_bytes": None if None in held else round(sum(held) / samples),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def _mean(lines: Sequence[Line], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


__all__ = ["group_of", "parts_of", "summarise"]
