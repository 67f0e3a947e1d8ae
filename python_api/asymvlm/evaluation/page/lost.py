"""Samples that a method lost: the whole model answered right, the pruned one wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asymvlm.evaluation.arms import FULL

RIGHT = 0.5  # score from which an answer counts as right
MOST = 6  # samples that are shown

Line = Mapping[str, Any]


@dataclass
class View:
    """What one setting made of a sample. ``pictures`` are PNG files, one an image; without them ``why`` says why."""

    method: str
    keep: float | str
    answer: str
    score: float
    kept: int
    vision_tokens: int
    pictures: list[bytes] = field(default_factory=list)
    why: str = ""

    @property
    def right(self) -> bool:
        return self.score >= RIGHT


@dataclass
class Lost:
    """A sample beside what every method made of it at one keep ratio; `full` is the whole model's."""

    sample: Line
    keep: float | str
    full: View
    views: list[View]


def find_lost(
    samples: Sequence[Line], answers: Sequence[Line], metric: str, most: int = MOST
) -> tuple[list[Lost], int]:
    """Samples to show, and how many there are.

    Every method has its turn, and each shows what it lost at the largest ratio at which it lost anything, in the order
    of the samples.

    Args:
        samples, answers: lines of the files of a run.
        metric: by whose scores an answer is right.
        most: samples to return at most, each once.
    """
    views: dict[int, dict[tuple[str, float | str], View]] = defaultdict(dict)
    for line in answers:
        views[line["sample"]][line["method"], line["keep"]] = View(
            method=line["method"],
            keep=line["keep"],
            answer=line["answer"],
            score=line["scores"][metric],
            kept=line["kept"],
            vision_tokens=line["vision_tokens"],
        )
    lost: dict[str, dict[float | str, list[int]]] = defaultdict(lambda: defaultdict(list))
    some: set[int] = set()
    for number, of in sorted(views.items()):
        if not of[FULL, 1.0].right:
            continue
        for (method, keep), view in of.items():
            if not view.right:
                lost[method][keep].append(number)
                some.add(number)
    shown: list[Lost] = []
    for number, keep in _in_turn([_ordered(by_keep) for by_keep in lost.values()], most):
        found = [view for (_, at), view in views[number].items() if at == keep]
        shown.append(Lost(samples[number], keep, views[number][FULL, 1.0], found))
    return shown, len(some)


def _ordered(by_keep: Mapping[float | str, list[int]]) -> Iterator[tuple[int, float | str]]:
    """Largest ratio first; a method's own budget last."""
    for keep in sorted(by_keep, key=lambda keep: -keep if isinstance(keep, (int, float)) else 1):
        yield from ((number, keep) for number in by_keep[keep])


def _in_turn(queues: list[Iterator[Any]], most: int) -> list[tuple[int, float | str]]:
    taken: dict[int, float | str] = {}
    while queues and len(taken) < most:
        for queue in list(queues):
            fresh = next((entry for entry in queue if entry[0] not in taken), None)
            if fresh is None:
                queues.remove(queue)
            elif len(taken) < most:
                taken[fresh[0]] = fresh[1]
    return sorted(taken.items())


__all__ = ["MOST", "RIGHT", "Lost", "View", "find_lost"]
