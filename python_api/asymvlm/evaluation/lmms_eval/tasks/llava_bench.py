"""Functions of ``llava_bench_judged.yaml``. The rules for the judge are those that lmms-eval carries."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asymvlm.evaluation.lmms_eval.tasks.judge import NUMBER, reply


def visual(doc: Mapping[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    scores = reply(prompt(doc, answers[0]), read_scores)
    return {"relative_score": scores, "unjudged": scores}


def prompt(doc: Mapping[str, Any], answer: str) -> str:
    """The judge sees captions in place of the image, the question, and both answers."""
    rule = _rules()["llava_bench_" + doc["category"]]
    role, captions = rule.get("role", "user"), doc["caption"]
    context = captions if isinstance(captions, str) else "\n".join(captions)
    parts = [f"[Context]\n{context}", f"[Question]\n{doc['question']}"]
    for number, text in enumerate((doc["gpt_answer"], answer), 1):
        parts += [f"[{role} {number}]\n{text}", f"[End of {role} {number}]"]
    return "\n\n".join([*parts, f"[System]\n{rule['prompt']}"]) + "\n\n"


def read_scores(text: str) -> tuple[float, float]:
    """Scores of the reference and of the answer: the two numbers in the first line. Raises ValueError without them."""
    numbers = [float(number) for number in NUMBER.findall(text.strip().partition("\n")[0])]
    if len(numbers) != 2 or not all(0 < number <= 10 for number in numbers):
        raise ValueError(f"first line {text.strip()[:60]!r} found, wanted two scores from 1 to 10")
    return numbers[0], numbers[1]


def relative_score(scores: Sequence[tuple[float, float] | None]) -> float:
    """Mean score of the answers in percent of that of the references; NaN if nothing was judged."""
    judged = [pair for pair in scores if pair is not None]
    return 100 * sum(pair[1] for pair in judged) / sum(pair[0] for pair in judged) if judged else math.nan


@functools.cache
def _rules() -> dict[str, dict[str, str]]:
    found = importlib.util.find_spec("lmms_eval")
    file = Path(str(found and found.origin)).parent / "tasks" / "llava-in-the-wild" / "rule.json"
    rules: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return rules
