"""Questions about images, from a JSONL file or a `datasets` dataset, as model inputs, for train, calibrate and
evaluate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.app.loading import open_image
from asymvlm.app.session import InputError, Session
from asymvlm.files.json_files import FileError, first_line, parse, read_lines
from asymvlm.files.pictures import as_rgb
from asymvlm.hf.arguments import IDS, MASK
from asymvlm.models import adapter_for

if TYPE_CHECKING:
    from PIL.Image import Image

FIELDS = ("image", "question", "answer")


@dataclass(frozen=True)
class Question:
    """One sample. Images are opened when it is used; ``answers`` holds every accepted one, the first is trained on."""

    images: tuple[Any, ...]  # paths, or PIL images
    question: str
    answers: tuple[str, ...]
    where: str = ""  # file and line, for errors
    id: str = ""  # the caller's name for it
    group: str = ""  # samples that only count together, such as the questions of one image

    def open(self) -> list[Image]:
        """The images, RGB. Raises InputError at the first that cannot be read."""
        return [open_image(image) if isinstance(image, (str, Path)) else as_rgb(image) for image in self.images]


def read_jsonl(file: Path) -> list[Question]:
    """Samples of a JSONL file: ``{"image": path or paths, "question": text, "answer": text or texts}`` a line.

    Relative paths start at the file's folder. ``answer`` may be left out where it is not needed; ``id`` and ``group``,
    text or whole numbers, are for `asymvlm.evaluate`.

    Raises:
        InputError: if the file cannot be read, or at the first line that is not such a record; names the line.
    """
    try:
        found = [_question(parse(line, where), where, file.parent) for where, line in read_lines(file)]
    except FileError as error:
        raise InputError(str(error)) from error
    if not found:
        raise InputError(f"{file}: no samples, wanted one JSON object a line")
    return found


def check_images(samples: Sequence[Question]) -> None:
    """Find missing image files before a long run does. Images inside a dataset are not looked at.

    Raises:
        InputError: naming the first missing ones, with the line that wants each.
    """
    if isinstance(samples, DatasetQuestions):
        return
    wanted = [(image, sample.where) for sample in samples for image in sample.images if isinstance(image, Path)]
    missing = [f"{where}: image {image}" for image, where in wanted if not os.path.isfile(os.path.expanduser(image))]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{len(missing)} of {len(wanted)} image files are missing: {'; '.join(missing[:3])}{more}")


class DatasetQuestions(Sequence[Question]):
    """Samples of a `datasets` dataset with columns image, question and answer; rows are read when asked for."""

    def __init__(self, name: str, split: str, columns: Mapping[str, str]) -> None:
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                f"dataset {name!r} needs the package datasets, which is not installed; or pass a JSONL file"
            ) from error
        try:
            self.rows: Any = datasets.load_dataset(name, split=split)
        except Exception as error:  # of the hub, of a script, of a damaged file: whatever the package raises
            raise InputError(f"cannot load dataset {name!r}, split {split!r}: {first_line(error)}") from error
        self.name, self.columns = name, columns
        missing = [column for column in columns.values() if column not in self.rows.column_names]
        if missing:
            raise InputError(
                f"dataset {name!r} has no column {missing[0]!r}, found {', '.join(self.rows.column_names)}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def count_without_answer(self) -> int:
        """Read from the column of answers alone."""
        return sum(answer is None or answer == [] for answer in self.rows[self.columns["answer"]])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = self.rows[place]
        record = {name: row[column] for name, column in self.columns.items()}
        return _question(record, f"{self.name}[{place}]", Path())


def prepare_prompt(session: Session, sample: Question) -> dict[str, Any]:
    """Model inputs of the prompt alone, and ``answers`` beside them."""
    return {**session.prepare(sample.open(), sample.question), "answers": sample.answers}


def prepare_with_answer(session: Session, sample: Question) -> dict[str, Any]:
    """Model inputs of the prompt with the first answer behind it, and ``labels`` that mark the answer.

    Without an answer, those of the prompt alone.
    """
    inputs: dict[str, Any] = dict(session.prepare(sample.open(), sample.question))
    if not sample.answers:
        return inputs
    tokenizer = getattr(session.processor, "tokenizer", session.processor)
    ids = list(tokenizer(sample.answers[0], add_special_tokens=False)[IDS])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ids.append(tokenizer.eos_token_id)
    adapter = adapter_for(session.model)
    prompt = inputs[IDS]
    new = torch.tensor([ids], device=prompt.device, dtype=prompt.dtype)
    labels = torch.full_like(prompt, -100)
    for name in adapter.per_token:
        if name in inputs:  # a suffix is of type 1 where the prompt sees itself both ways, else it is plain text
            inputs[name] = torch.cat([inputs[name], torch.full_like(new, int(adapter.open_prompt)).to(inputs[name])], 1)
    if MASK in inputs:
        inputs[MASK] = torch.cat([inputs[MASK], torch.ones_like(new).to(inputs[MASK])], 1)
    inputs[IDS] = torch.cat([prompt, new], 1)
    return {**inputs, "labels": torch.cat([labels, new], 1)}


class Prompts(Sequence[Mapping[str, Any]]):
    """`prepare_prompt` of each sample, when it is asked for."""

    def __init__(self, session: Session, samples: Sequence[Question]) -> None:
        self.session, self.samples = session, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Any) -> Any:
        return prepare_prompt(self.session, self.samples[place])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))


def _question(record: Any, where: str, folder: Path) -> Question:
    if not isinstance(record, dict):
        raise InputError(f"{where}: {type(record).__name__} found, wanted an object with {', '.join(FIELDS)}")
    images = record.get("image", record.get("images"))
    images = images if isinstance(images, (list, tuple)) else [images]
    question, answers = record.get("question"), record.get("answer", record.get("answers"))
    answers = [] if answers is None else answers if isinstance(answers, (list, tuple)) else [answers]
    if not images or any(image is None for image in images):
        raise InputError(f"{where}: no 'image', wanted a path or a list of paths")
    for image in images:
        if isinstance(image, str) and (not image.strip() or "\0" in image):
            raise InputError(f"{where}: 'image' {image!r} found, wanted a path")
        if not isinstance(image, str) and not hasattr(image, "convert"):
            raise InputError(f"{where}: 'image' is a {type(image).__name__}, wanted a path or a list of paths")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: 'question' {question!r} found, wanted some text")
    if not all(isinstance(answer, (str, int, float)) and not isinstance(answer, bool) for answer in answers):
        raise InputError(f"{where}: 'answer' {answers!r} found, wanted text or a list of texts")
    opened = tuple(folder / image if isinstance(image, str) else image for image in images)
    return Question(opened, question.strip(), tuple(str(answer) for answer in answers), where, **_names(record, where))


def _names(record: dict[str, Any], where: str) -> dict[str, str]:
    """``id`` and ``group`` of a record, empty where it has none."""
    found = {name: record.get(name, "") for name in ("id", "group")}
    for name, value in found.items():
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise InputError(f"{where}: {name!r} {value!r} found, wanted text or a whole number")
    return {name: str(value) for name, value in found.items()}


def question_of(record: Any, where: str, folder: Path | None = None) -> Question:
    """A sample from a mapping with the fields of a JSONL line; images may be PIL images.

    Raises:
        InputError: beginning with ``where``, if it is not such a record.
    """
    return _question(record, where, folder or Path())
