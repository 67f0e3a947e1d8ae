"""Functions of ``mmdu.yaml``, and the folder that it reads, from the published files.

python -m asymvlm.evaluation.lmms_eval.tasks.mmdu BENCHMARK.json PICTURES FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asymvlm.evaluation.lmms_eval.tasks.judge import mean, reply

PLACE = re.compile(r"<ImageHere>\s*")
CRITERIA = (
    "creativity",
    "richness",
    "visual perception",
    "logical coherence",
    "answer accuracy",
    "understanding of how the images relate",
)
ASK = """\
You judge one answer of an assistant in a dialogue about several images, which you do not see. Compare it with the
reference answer, which was written by somebody who saw them. Consider {criteria}.

Question:
{question}

Reference answer:
{reference}

Answer to judge:
{answer}

Write one line, "overall: N", with N from 0 (useless) to 10 (as good as an answer can be; the reference is about 8)."""
OVERALL = re.compile(r"overall\s*:\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


def visual(doc: Mapping[str, Any]) -> list[Any]:
    return [image.convert("RGB") for image in doc["images"]]


def text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["questions"][0])


def messages(
    doc: Mapping[str, Any], round_idx: int | None = None, previous_output: Any = None, previous_round_info: Any = None
) -> Any:
    """The dialogue up to the question of a turn; the answers in it are ``previous_output``.

    Returns:
        messages of the first turn; for later ones ``(messages, over, answers, None)``.
    """
    answers = list(previous_output or [])
    if round_idx is not None and round_idx >= len(doc["questions"]):
        return None, True, answers, None
    images = iter(visual(doc))
    told: list[dict[str, Any]] = []
    for turn, question in enumerate(doc["questions"][: len(answers) + 1]):
        told.append({"role": "user", "content": list(_content(question, images))})
        if turn < len(answers):
            told.append({"role": "assistant", "content": [{"type": "text", "text": answers[turn]}]})
    return told if round_idx is None else (told, False, answers, None)


def _content(question: str, images: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Words and images of a question in order. Raises ValueError if it asks for more images than are left."""
    for number, words in enumerate(PLACE.split(question)):
        if number:
            image = next(images, None)
            if image is None:
                raise ValueError(f"question {question[:60]!r} asks for more images than its dialogue has")
            yield {"type": "image", "url": image}
        if words.strip():
            yield {"type": "text", "text": words}


def results(doc: Mapping[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
    """Judgements of a dialogue: its mean, its last turn, and those that are missing."""
    given = answers[0] if isinstance(answers[0], list) else list(answers)
    if len(given) != len(doc["questions"]):
        raise ValueError(f"{len(given)} answers found to {len(doc['questions'])} questions, wanted one each")
    scores = [
        reply(ASK.format(criteria=", ".join(CRITERIA), question=question, reference=reference, answer=answer), read)
        for question, reference, answer in zip(doc["questions"], doc["answers"], given, strict=True)
    ]
    judged = [score for score in scores if score is not None]
    return {"overall": mean(judged) if judged else None, "last_turn": scores[-1], "unjudged": scores}


def read(text: str) -> float:
    """The overall score in a reply. Raises ValueError without one from 0 to 10."""
    found = OVERALL.findall(text)
    if len(found) != 1 or float(found[0]) > 10:
        raise ValueError(f"reply {text[:60]!r} found, wanted one line 'overall: N' with N from 0 to 10")
    return float(found[0])


def unjudged(dialogues: Sequence[Sequence[float | None]]) -> int:
    return sum(score is None for scores in dialogues for score in scores)


def rows(benchmark: Path, pictures: Path) -> Iterator[dict[str, Any]]:
    """Dialogues of the published JSON: ``id``, ``images`` (paths), ``questions``, ``answers``.

    Raises:
        ValueError: for a dialogue whose turns do not alternate, or whose images are missing.
    """
    for place, record in enumerate(json.loads(benchmark.read_text(encoding="utf-8"))):
        turns = record["conversations"]
        asked, answered = turns[::2], turns[1::2]
        if len(asked) != len(answered) or any(turn["from"] != "user" for turn in asked):
            raise ValueError(f"{benchmark}, dialogue {place}: turns found that do not alternate, user first")
        images = [pictures / Path(image).name for image in record["image"]]
        if lacking := [str(image) for image in images if not image.is_file()]:
            raise ValueError(f"{benchmark}, dialogue {place}: {', '.join(lacking[:3])} not found")
        yield {
            "id": str(record.get("id", place)),
            "images": [str(image) for image in images],
            "questions": [turn["value"] for turn in asked],
            "answers": [turn["value"] for turn in answered],
        }


def main(benchmark: Path, pictures: Path, folder: Path) -> None:
    """Write the folder of the data set."""
    import datasets

    texts = datasets.Sequence(datasets.Value("string"))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.Sequence(datasets.Image()),
            "questions": texts,
            "answers": texts,
        }
    )
    dataset = datasets.Dataset.from_list(list(rows(benchmark, pictures)), features=features)
    datasets.DatasetDict({"test": dataset}).save_to_disk(folder)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
