"""What an answer is judged by, and how the judgements of a set of samples become one number.

Every metric is a ratio of sums over units, ``sum(numerator) / sum(denominator)``: a mean has denominators of 1, F1 has
``2 TP / (2 TP + FP + FN)``, and a metric of groups has groups as units.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymvlm.app.metrics import Score, anls, exact_match, relaxed_accuracy
from asymvlm.app.session import InputError
from asymvlm.evaluation.vqa import AGREEING, vqa_accuracy
from asymvlm.files.json_files import LARGEST, first_line

Parts = Callable[[str, Sequence[str]], tuple[float, float]]
Check = Callable[[Sequence[str]], str]


def yes_or_no(text: str) -> str:
    """``"yes"``, ``"no"`` or ``"other"``, by the first letters of an answer, as MME reads it."""
    plain = text.lower().strip().replace(".", "")
    if plain in ("y", "n"):
        return {"y": "yes", "n": "no"}[plain]
    return next((word for word in ("yes", "no") if word in plain[:4]), "other")


def yes_no_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 if a yes is a yes and a no a no; an answer that is neither is wrong."""
    return float(yes_or_no(answer) in map(yes_or_no, accepted))


def f1_parts(answer: str, accepted: Sequence[str]) -> tuple[float, float]:
    """``(2 TP, 2 TP + FP + FN)`` of one answer; yes is the positive class, and an answer that is neither is no yes."""
    found, wanted = yes_or_no(answer) == "yes", yes_or_no(accepted[0]) == "yes"
    return 2.0 * (found and wanted), float(found) + float(wanted)


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Args:
        name: as it is asked for.
        score: of one answer, given the accepted ones: a finite number, more is better.
        parts: numerator and denominator of one answer, where the metric is no mean of scores.
        grouped: samples of one ``group``, else of the same images, count together: right where each of them is.
        check: why accepted answers cannot be judged by it; empty where they can.
    """

    name: str
    score: Score
    parts: Parts | None = None
    grouped: bool = False
    check: Check | None = None


def _people(accepted: Sequence[str]) -> str:
    told = f"{len(accepted)} answers, wanted what {AGREEING + 1} people or more answered (VQA has ten)"
    return "" if len(accepted) > AGREEING else told


def _yes_no(accepted: Sequence[str]) -> str:
    known = len(accepted) == 1 and accepted[0].lower().strip().replace(".", "") in ("yes", "no")
    return "" if known else f"answers {list(accepted)!r}, wanted one, yes or no"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact", exact_match),
        Metric("anls", anls),
        Metric("relaxed", relaxed_accuracy),
        Metric("vqa", vqa_accuracy, check=_people),
        Metric("pope-f1", yes_no_accuracy, parts=f1_parts, check=_yes_no),
        Metric("mme-plus", yes_no_accuracy, grouped=True, check=_yes_no),
    )
}


def find_metric(metric: str | Metric | Score) -> Metric:
    """A metric as it was given: one of `METRICS` by name, ``module:function``, a function, or a `Metric`.

    Raises:
        InputError: for a name that nobody has, or a module or function that cannot be imported.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        name = f"{getattr(metric, '__module__', '')}:{getattr(metric, '__qualname__', type(metric).__name__)}"
        return Metric(name, metric)
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    if not isinstance(metric, str) or ":" not in metric:
        raise InputError(f"metric {metric!r} found, wanted one of {', '.join(METRICS)}, or module:function")
    module, _, function = metric.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the caller's module raises as it is imported
        raise InputError(f"metric {metric!r} cannot be imported ({type(error).__name__}: {error})") from error
    if isinstance(found, Metric):
        return found
    if not callable(found):
        raise InputError(f"metric {metric!r} is a {type(found).__name__}, wanted a function of an answer and a list")
    return Metric(metric, found)


def judged(metric: Metric, answer: str, accepted: Sequence[str], where: str) -> float:
    """The score of one answer.

    Raises:
        InputError: naming the sample, if a metric of the caller's own fails or gives no finite number; likewise its
            ``parts``, which are put together once everything has been answered.
    """
    try:
        value = float(metric.score(answer, list(accepted)))  # a list of its own, which it may change
        parts = (0.0, 1.0) if metric.parts is None else tuple(map(float, metric.parts(answer, list(accepted))))
    except Exception as error:
        raise InputError(f"{where}: metric {metric.name} failed ({_told(error)})") from error
    if not abs(value) < LARGEST:
        raise InputError(f"{where}: metric {metric.name} gave {value}, wanted a finite number below 2**63")
    if len(parts) != 2 or not all(abs(part) < LARGEST for part in parts) or parts[1] < 0:
        raise InputError(
            f"{where}: parts of metric {metric.name} gave {parts}, wanted a finite numerator and a denominator >= 0"
        )
    return value


def unfit(metric: Metric, accepted: Sequence[str]) -> str:
    """Why a metric cannot judge by these answers; empty where it can. A check that fails cannot."""
    try:
        return "" if metric.check is None else metric.check(list(accepted))
    except Exception as error:  # of the caller's own
        return f"its check failed ({_told(error)})"


def code_of(made: Any) -> str | None:
    """Digest of the file that a function or class of the caller's own stands in; None where there is none to read."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(made) if inspect.isroutine(made) else made) or ""
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError, ValueError):
        return None


def of_callers(metrics: Sequence[Metric]) -> dict[str, str | None]:
    """Of each metric that is not one of this package, by its name: the digest of its code."""
    return {metric.name: code_of(metric.score) for metric in metrics if metric not in METRICS.values()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


__all__ = [
    "METRICS",
    "Metric",
    "anls",
    "exact_match",
    "f1_parts",
    "find_metric",
    "of_callers",
    "judged",
    "relaxed_accuracy",
    "unfit",
    "vqa_accuracy",
    "yes_no_accuracy",
    "yes_or_no",
]
