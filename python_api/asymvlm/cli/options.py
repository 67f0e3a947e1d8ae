"""Options that several commands take, and the checks that need no model: they run before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from PIL.Image import Image

from asymvlm.budget_file import AnyBudget, load_budget
from asymvlm.loading import Device, Dtype, open_image
from asymvlm.policies import TextEviction, TurnEviction
from asymvlm.scorer import Scorer
from asymvlm.session import InputError
from asymvlm_kernels import UniformBudget

DEFAULT_KEEP = 0.5
DEFAULT_RETENTION = 0.5

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
TextThresholdOption = Annotated[
    int | None, typer.Option("--text-threshold", help="Generated tokens that are held before any is evicted.")
]
TextRetentionOption = Annotated[
    str | None,
    typer.Option(
        "--text-retention",
        metavar="RATIO",
        help="Share of the threshold that remains after an eviction, in (0, 1].",
        show_default=str(DEFAULT_RETENTION),
    ),
]
ScorerOption = Annotated[
    str | None,
    typer.Option("--scorer", "-s", help="Scorer: a folder, or a hub id. Brings its budget; cosine similarity if none."),
]
AnyModelOption = Annotated[
    bool, typer.Option("--any-model", help="Use --scorer on a model it was not trained for, of equal width.")
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


def parse_text_eviction(threshold: int | None, retention: str | None) -> TextEviction | None:
    """The policy that ``--text-threshold`` and ``--text-retention`` ask for; None without a threshold.

    Raises:
        InputError: if they do not fit each other, or a retention comes alone.
    """
    if threshold is None and retention is not None:
        raise InputError(f"--text-retention {retention} found without --text-threshold, wanted both")
    if threshold is None:
        return None
    try:
        return TextEviction(threshold, _retention("--text-retention", retention))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"--text-threshold: {error}") from error


def parse_turn_eviction(threshold: int, retention: str | None) -> TurnEviction:
    """The policy of a dialogue. Raises InputError on values out of range."""
    try:
        return TurnEviction(threshold, _retention("--turn-retention", retention))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"--turn-threshold: {error}") from error


def _retention(option: str, value: str | None) -> float:
    try:
        ratio = DEFAULT_RETENTION if value is None else float(value)
    except ValueError as error:
        raise InputError(f"{option}: {value} found, wanted a ratio in (0, 1]") from error
    if not 0 < ratio <= 1:
        raise InputError(f"{option}: {value} found, wanted a ratio in (0, 1]")
    return ratio


def parse_budget_of(scorer: Scorer | None, keep: str | None, file: Path | None) -> AnyBudget | None:
    """`parse_budget`, or None where nothing is asked for and the scorer brings a budget of its own."""
    own = scorer is not None and scorer.budget is not None and keep is None and file is None
    return None if own else parse_budget(keep, file)


def load_scorer(name: str | None) -> Scorer | None:
    """The scorer that ``--scorer`` names. Raises InputError if it cannot be loaded."""
    try:
        return None if name is None else Scorer.from_pretrained(name)
    except ValueError as error:
        raise InputError(f"--scorer: {error}") from error


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
