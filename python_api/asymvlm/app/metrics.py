"""How good an answer is, between 0 and 1: the metrics of document and chart benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Score = Callable[[str, Sequence[str]], float]


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is an accepted one, case and runs of white space aside."""
    return float(_plain(answer) in map(_plain, accepted))


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the closest accepted answer, 0 below one half (DocVQA)."""
    best = max((_similarity(_plain(answer), _plain(other)) for other in accepted), default=0.0)
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if a number is within 5 % of an accepted one, or a text equals it (ChartQA)."""
    found = _number(answer)
    for other in accepted:
        wanted = _number(other)
        if found is not None and wanted is not None:
            if abs(found - wanted) <= 0.05 * abs(wanted):
                return 1.0
        elif _plain(answer) == _plain(other):
            return 1.0
    return 0.0


METRICS: dict[str, Score] = {"exact": exact_match, "anls": anls, "relaxed": relaxed_accuracy}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    plain = text.strip().replace(",", "").removesuffix("%").strip().removeprefix("$")
    try:
        return float(plain)
    except ValueError:
        return None


def _similarity(a: str, b: str) -> float:
    """``1 - edits / longer length``."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return 1 - row[-1] / max(len(a), len(b))
