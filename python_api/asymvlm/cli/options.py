"""Options that several commands take, and the checks that need no model: they run before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from PIL.Image import Image

from asymvlm.budget_file import AnyBudget, load_budget
from asymvlm.loading import Device, Dtype, open_image
from asymvlm.session import InputError
from asymvlm_kernels import UniformBudget

DEFAULT_KEEP = 0.5

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Folder written by save_pretrained, or a hub id.")]
QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What to ask about the image.")]
KeepOption = Annotated[  # text, so that a value that is no number is told like one out of range
    str | None,
    typer.Option(
        "--keep",
        "-k",
        metavar="RATIO",
        help="Share of the vision tokens to keep, in (0, 1].",
        show_default=str(DEFAULT_KEEP),
    ),
]
BudgetOption = Annotated[
    Path | None,
    typer.Option(
        "--budget", help='JSON file with a budget, e.g. {"type": "uniform", "ratio": 0.5}; instead of --keep.'
    ),
]
ScoredText = Literal["all", "user"]
TextOption = Annotated[
    ScoredText,
    typer.Option("--text", help="What vision is scored against: all text tokens, or the words of the user's turns."),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Weights' type; auto is the checkpoint's own.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto is CUDA where there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]


def parse_budget(keep: str | None, file: Path | None) -> AnyBudget:
    """The budget that ``--keep`` or ``--budget`` asks for; keep `DEFAULT_KEEP` where neither is given.

    Raises:
        InputError: if both are given, the ratio is outside (0, 1], or the file holds no valid budget.
    """
    if keep is not None and file is not None:
        raise InputError(f"--keep {keep} and --budget {file} exclude each other, wanted one of them")
    if file is not None:
        try:
            return load_budget(file)
        except ValueError as error:
            raise InputError(f"--budget: {error}") from error
    try:
        return UniformBudget(DEFAULT_KEEP if keep is None else float(keep))
    except ValueError as error:
        raise InputError(f"--keep: {keep} found, wanted a ratio in (0, 1]") from error


def parse_question(question: str) -> str:
    """The question without surrounding space. Raises InputError if nothing is left."""
    text = question.strip()
    if not text:
        raise InputError(f"--question: {question!r} found, wanted some text")
    return text


def read_images(files: list[Path]) -> list[Image]:
    """Every image, RGB. Raises InputError at the first that cannot be read."""
    return [open_image(file) for file in files]


def check_output(file: Path) -> Path:
    """A file to write a figure to. Raises InputError if its folder is missing or its ending is no image format."""
    wanted = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
    if file.suffix.lower() not in wanted:
        raise InputError(f"--output: {file} has the ending {file.suffix!r}, wanted one of {', '.join(wanted)}")
    if not file.parent.is_dir():
        raise InputError(f"--output: {file.parent} is not a folder, wanted an existing one")
    if file.is_dir():
        raise InputError(f"--output: {file} is a folder, wanted a file")
    return file
