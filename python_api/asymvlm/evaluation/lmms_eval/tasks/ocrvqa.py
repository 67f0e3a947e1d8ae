"""Functions of ``ocrvqa.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def one_question_a_row(dataset: Any) -> Any:
    """The data set has a cover a row, with lists of ``questions`` and ``answers``; a row that holds one pair stays.

    Rows of a cover stand together, and each holds the cover's file as it is: nothing is decoded or encoded again.
    """
    if "question" in dataset.column_names:
        return dataset
    from datasets import Image

    files = dataset.cast_column("image", Image(decode=False))
    pairs = files.map(_pairs, batched=True, batch_size=64, remove_columns=dataset.column_names)
    return pairs.cast_column("image", Image())


def _pairs(covers: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {"image": [], "question": [], "answer": []}
    for image, questions, answers in zip(covers["image"], covers["questions"], covers["answers"], strict=True):
        for question, answer in zip(questions, answers, strict=True):
            rows["image"].append(image)
            rows["question"].append(question)
            rows["answer"].append(answer)
    return rows


def visual(doc: Mapping[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    return {"accuracy": float(_plain(answers[0]) == _plain(doc["answer"]))}


def _plain(answer: str) -> str:
    """Without case, space around it and a full stop behind it."""
    return " ".join(answer.lower().split()).removesuffix(".").strip()
