"""Where `asymvlm train` and `asymvlm calibrate` get their samples from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from asymvlm.samples import DatasetQuestions, Question, check_images, read_jsonl
from asymvlm.session import InputError

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help='JSONL file, {"image": ..., "question": ..., "answer": ...} a line.'),
]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", help="Name or folder for datasets.load_dataset, instead of --data.")
]
SplitOption = Annotated[str, typer.Option("--split", help="Split of --dataset.")]
ColumnsOption = Annotated[
    str, typer.Option("--columns", help="Columns of --dataset that hold image, question and answer.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first samples only.")]
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
    """A folder to write to. Raises InputError if it is a file, or its parent is missing."""
    if folder.is_file():
        raise InputError(f"{option}: {folder} is a file, wanted a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{option}: {folder.parent} is not a folder, wanted an existing one")
    return folder
