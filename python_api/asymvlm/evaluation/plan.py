"""What a run is about to do: samples, settings, metrics, and the units of work in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asymvlm.app.samples import Question, check_images, question_of, read_jsonl
from asymvlm.app.session import InputError, Session
from asymvlm.evaluation.arms import Arm, Arms, Choices, make_arms
from asymvlm.evaluation.metrics import Metric, find_metric, unfit
from asymvlm.evaluation.store import Unit
from asymvlm.files.json_files import LARGEST
from asymvlm.patch import patch

KEEP = (1.0, 0.75, 0.5, 0.33, 0.22, 0.11)


@dataclass(frozen=True)
class Limits:
    """How a run generates and compares.

    Args:
        metrics: names, functions or `Metric` objects, the first one leads.
        baseline: a method to compare with at equal ratio, beside ``full``.
        batch_size: prompts at a time. Rounding, and so an answer in the balance, may differ with it.
        max_new_tokens: longest answer.
        seed: of methods that draw, and of drawn exchanges in p-values.
    """

    metrics: Sequence[str | Metric | Callable[..., float]] = ("exact",)
    baseline: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            check_whole(name, value, 1)
        check_whole("seed", self.seed, 0)
        if not self.metrics:
            raise InputError("metric: none found, wanted one or more")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise InputError for what is no whole number from ``least`` on, or one that torch and JSON cannot hold."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: {value!r} found, wanted a whole number of at least {least}")
    if value >= LARGEST:
        raise InputError(f"{name}: a number of {len(str(value))} digits found, wanted one below 2**63")


@dataclass(frozen=True)
class Plan:
    """A run that has been checked against its model and samples, of which nothing has been generated."""

    session: Session
    samples: Sequence[Question]
    choices: Choices
    limits: Limits
    arms: Arms
    metrics: list[Metric] = field(default_factory=list)

    @property
    def batches(self) -> list[range]:
        size, count = self.limits.batch_size, len(self.samples)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def units(self) -> list[Unit]:
        """All settings of a batch before the next batch."""
        return [
            Unit(number, arm.method, arm.keep, tuple(batch))
            for number, batch in enumerate(self.batches)
            for arm in self.arms.arms
        ]

    @property
    def generations(self) -> int:
        return len(self.samples) * len(self.arms.arms)

    def settings(self) -> dict[str, Any]:
        """For the record: all that was asked for."""
        return {
            "arms": [arm.to_dict() for arm in self.arms.arms],
            "skipped": self.arms.skipped,
            "metrics": [metric.name for metric in self.metrics],
            "batch_size": self.limits.batch_size,
            "max_new_tokens": self.limits.max_new_tokens,
            "seed": self.limits.seed,
            "text": self.choices.text,
        }

    def sample_lines(self) -> list[dict[str, Any]]:
        """The samples as lines of their file."""
        return [
            {
                "sample": number,
                "id": name_of(sample, number),
                "images": [os.path.abspath(i) if isinstance(i, (str, Path)) else None for i in sample.images],
                "question": sample.question,
                "answers": list(sample.answers),
                "group": sample.group,
            }
            for number, sample in enumerate(self.samples)
        ]


def make_plan(session: Session, samples: Sequence[Question], choices: Choices, limits: Limits) -> Plan:
    """Check what is asked for before anything is generated.

    Raises:
        InputError: for samples that cannot be judged, and settings that the model cannot be patched with.
    """
    metrics = check_samples(samples, limits)
    arms = make_arms(session.model, session.processor, choices)
    if limits.baseline is not None and limits.baseline not in {arm.method for arm in arms.arms}:
        known = ", ".join(dict.fromkeys(arm.method for arm in arms.arms))
        raise InputError(f"baseline: {limits.baseline!r} found, wanted a method that is measured: {known}")
    for arm in arms.arms:
        check_patch(session, arm)
    return Plan(session, samples, choices, limits, arms, metrics)


def check_samples(samples: Sequence[Question], limits: Limits) -> list[Metric]:
    """The metrics, once they are known to be able to judge every sample; no model is needed.

    Raises:
        InputError: for a metric that nobody has, and at the first sample that one of them cannot judge.
    """
    metrics = [find_metric(metric) for metric in limits.metrics]
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise InputError(f"metric: {', '.join(names)} found, wanted each once")
    if not len(samples):
        raise InputError("no samples, wanted one or more")
    for number, sample in enumerate(samples):
        for metric in metrics:
            told = unfit(metric, sample.answers) if sample.answers else "no answer, wanted one to judge by"
            if told:
                raise InputError(f"{sample.where or f'sample {number}'}: metric {metric.name}: {told}")
    return metrics


def check_patch(session: Session, arm: Arm) -> None:
    """Raise InputError where a model cannot be patched with a setting."""
    try:
        with patch(session.model, vision=arm.vision, cache=arm.cache):
            pass
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{arm.label} cannot be measured on {session.name}: {error}") from error


def read_samples(samples: str | Path | Sequence[Question | Mapping[str, Any]], limit: int | None) -> list[Question]:
    """Samples as a caller of `evaluate` gives them: a JSONL file, or records with the fields of its lines.

    Raises:
        InputError: naming the file and line, or the number of the record.
    """
    if limit is not None:
        check_whole("limit", limit, 1)
    if isinstance(samples, (str, Path)):
        found = read_jsonl(Path(samples))
    elif isinstance(samples, Mapping):
        raise InputError("samples: one record found, wanted a list of records or a JSONL file")
    else:
        rows = enumerate(samples)
        found = [row if isinstance(row, Question) else question_of(row, f"sample {number}") for number, row in rows]
    found = found if limit is None else found[:limit]
    check_images(found)
    return found


def name_of(sample: Question, number: int) -> str:
    """What a sample is called in the files: its own id, else the file and line, else its number."""
    return sample.id or sample.where.rpartition("/")[2] or str(number)


__all__ = ["KEEP", "Limits", "Plan", "check_samples", "make_plan", "name_of", "read_samples"]
