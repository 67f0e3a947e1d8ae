"""Evaluations without a model behind them: answers that follow from the prompt and the setting, at no cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from asymvlm.app.samples import Question
from asymvlm.app.session import Session
from asymvlm.evaluation.answering import Answered
from asymvlm.evaluation.arms import Choices
from asymvlm.evaluation.plan import Limits, Plan, make_plan
from asymvlm.evaluation.store import ANSWERS, COSTS

METHODS = ("asymvlm", "random", "stride")


@dataclass
class Clock:
    """A clock that ticks whenever it is read."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 0.125
        return self.now


def questions(page: Path, count: int) -> list[Question]:
    return [
        Question((page,), f"What is in line {number}?", ("yes" if number % 2 else "no",), f"qa.jsonl:{number + 1}")
        for number in range(count)
    ]


def plan_of(session: Session, samples: list[Question], batch_size: int = 3, **more: Any) -> Plan:
    choices = Choices({name: name for name in METHODS}, (1, 0.5, 0.25))
    return make_plan(session, samples, choices, Limits(("exact",), batch_size=batch_size, **more))


def made_up(session: Any, arm: Any, inputs: Any, max_new_tokens: int, clock: Any) -> Answered:
    """In place of `asymvlm.evaluation.answering.answer`."""
    rows = len(inputs["input_ids"])
    draws = [zlib.crc32(f"{arm.label} {row.tolist()}".encode()) for row in inputs["input_ids"]]
    kept = 16 if isinstance(arm.keep, str) else int(16 * arm.keep)
    report = SimpleNamespace(
        gap=[draw / 2**32 for draw in draws],
        kept=[kept] * rows,
        vision_tokens=[16] * rows,
        average_kept=[float(kept)] * rows,
        tokens_before=[30] * rows,
    )
    begun, ended = clock(), clock()
    texts = ["yes" if draw % 3 else "no" for draw in draws]
    return Answered(texts, [2] * rows, report, begun, ended - begun, 100 * rows, None)


def contents(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on interruptions."""
    return {name: (folder / name).read_bytes() for name in (ANSWERS, "samples.jsonl")}


class Killed(BaseException):
    """A process that is gone."""


def dying_writes(after: int) -> Callable[[Any, str, str], None]:
    """An `append` that writes as many bytes as are left of ``after`` in all, then is killed in the middle of it."""
    left = after

    def append(self: Any, name: str, text: str) -> None:
        nonlocal left
        content = text.encode()
        with (self.folder / name).open("ab") as file:
            file.write(content[:left])
        left -= len(content)
        if left < 0:
            raise Killed

    return append


__all__ = ["ANSWERS", "COSTS", "Clock", "Killed", "contents", "dying_writes", "made_up", "plan_of", "questions"]
