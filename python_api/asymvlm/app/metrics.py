"""How good an answer is, between 0 and 1: the metrics of document and chart benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Score = Callable[[str, Sequence[str]], float]
LIKE = 0.5  # least similarity that counts
TOLERANCE = 0.05  # of a number


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is an accepted one, case and runs of white space aside."""
    return float(_plain(answer) in map(_plain, accepted))


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the closest accepted answer, 0 below one half (DocVQA).

    Case and runs of white space are no edits; lengths are those of the texts as they are.
    """
    return max((_similarity(answer, other) for other in accepted), default=0.0)


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if a number is within 5 % of an accepted one, or a text equals it, case aside (ChartQA).

    A number is what Python reads as one, and ``12%`` is 0.12; an accepted 0 is compared as text.
    """
    return float(any(_relaxed(answer, other) for other in accepted))


METRICS: dict[str, Score] = {"exact": exact_match, "anls": anls, "relaxed": relaxed_accuracy}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _relaxed(answer: str, other: str) -> bool:
    found, wanted = _number(answer), _number(other)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return answer.lower() == other.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _similarity(answer: str, other: str) -> float:
    """``1 - edits / longer length``, 0 below `LIKE`."""
    length = max(len(answer), len(other))
    value = 1 - edits(_plain(answer), _plain(other)) / length if length else 1.0
    return value if value >= LIKE else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of a character."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]
