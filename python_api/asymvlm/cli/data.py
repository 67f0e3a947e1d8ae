"""Where `asymvlm train` and `asymvlm calibrate` get their samples from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asymvlm.app.samples import DatasetQuestions, Question, check_images, read_jsonl
from asymvlm.app.session import InputError
from asymvlm.cli import console

COLUMNS = "image,question,answer"


def read_samples(
    data: Path | None, dataset: str | None, split: str, columns: str, limit: int | None
) -> Sequence[Question]:
    """The samples that the options name.

    Raises:
        InputError: if not exactly one source is named, or it cannot be read.
    """
    if (data is None) == (dataset is None):
        found = "neither" if data is None else "both"
        raise InputError(f"wanted one of --data and --dataset, got {found}")
    samples: Sequence[Question]
    if data is not None:
        samples = read_jsonl(data)
    else:
        names = [name.strip() for name in columns.split(",")]
        if len(names) != 3 or not all(names):
            raise InputError(f"--columns: {columns!r} found, wanted three names like {COLUMNS}")
        assert dataset is not None
        samples = DatasetQuestions(dataset, split, dict(zip(("image", "question", "answer"), names, strict=True)))
    samples = samples if limit is None else samples[:limit]
    check_images(samples)
    return samples


def check_folder(folder: Path, option: str) -> Path:
    """A folder to write to. Raises InputError if it is a file, its parent is missing, or it cannot be written to."""
    if os.path.isfile(folder):
        raise InputError(f"{option}: {folder} is a file, wanted a folder")
    if not os.path.isdir(folder.absolute().parent):
        raise InputError(f"{option}: {folder.parent} is not a folder, wanted an existing one")
    try:
        with tempfile.TemporaryFile(dir=folder if os.path.isdir(folder) else folder.absolute().parent):
            return folder
    except OSError as error:
        raise InputError(f"{option}: {folder} cannot be written ({error.strerror}), wanted another folder") from error


def note_answers(samples: Sequence[Question]) -> int:
    """How many samples have no answer; says on stderr what that means for training. Reads no image of a file."""
    if isinstance(samples, DatasetQuestions):
        without = samples.count_without_answer()
    else:
        without = sum(not sample.answers for sample in samples)
    if without:
        console.say(
            f"{without} of {len(samples)} samples have no answer: these train what the model makes of the prompt, the "
            "others what it makes of the answer too"
        )
    return without
