"""What the options of a command mean; the checks need no model and run before anything is loaded."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from asymvlm.app.loading import open_image
from asymvlm.app.session import InputError, Session
from asymvlm.cli import console
from asymvlm.files.json_files import FileError, read_text
from asymvlm.methods import AsymVLM, BeforeMethod, InsideMethod, find_method
from asymvlm.settings.budget_file import AnyBudget, load_budget
from asymvlm.settings.eviction import TextEviction, TurnEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.scorer import Scorer
from asymvlm.settings.suitable import calibrated_with, spread_of
from asymvlm_kernels import UniformBudget

DEFAULT_KEEP = 0.5
DEFAULT_RETENTION = 0.5
LARGE = 20e6  # bytes of an image file that take a moment to read
ScoredText = Literal["all", "user"]
VISION_FLAGS = {"spread": "--spread", "at_least_relevant": "--at-least-relevant", "recall": "--recall"}


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


def parse_method(name: str | None, scorer: Scorer | None) -> BeforeMethod | InsideMethod | None:
    """The method that ``--method`` names. Raises InputError for an unknown name, and beside a scorer."""
    if name is None:
        return None
    if scorer is not None and name != AsymVLM.name:
        raise InputError(f"--scorer is that of the method {AsymVLM.name!r}, found beside --method {name}")
    try:
        found: BeforeMethod | InsideMethod = find_method(name, BeforeMethod, InsideMethod)
    except (TypeError, ValueError) as error:
        raise InputError(f"--method: {error}") from error
    return None if isinstance(found, AsymVLM) else found


def load_scorer(name: str | None) -> Scorer | None:
    """The scorer that ``--scorer`` names. Raises InputError if it cannot be loaded."""
    try:
        return None if name is None else Scorer.from_pretrained(name)
    except ValueError as error:
        raise InputError(f"--scorer: {error}") from error


def vouched(scorer: Scorer | None, session: Session, any_model: bool) -> Scorer | None:
    """The scorer, taken to another model than it was trained for where ``--any-model`` vouches for that.

    Raises:
        ValueError: on another width or family.
    """
    return scorer.transfer(session.model) if scorer is not None and any_model else scorer


def vision_settings(
    session: Session,
    scorer: Scorer | None,
    any_model: bool,
    budget: AnyBudget | None,
    scored: ScoredText,
    method: BeforeMethod | InsideMethod | None = None,
    *,
    spread: bool | None = None,
    at_least_relevant: bool = False,
    recall: str | None = None,
) -> VisionPruning:
    """What ``--scorer --any-model --keep --budget --text --method ...`` mean for a loaded model; no budget: their own.

    Raises:
        ValueError: as `VisionPruning` and `vouched` do, with arguments named as they are typed.
    """
    scorer = vouched(scorer, session, any_model)
    calibrated, background = calibrated_with(scorer if budget is None else None)
    try:
        return VisionPruning(
            scorer,
            budget,  # type: ignore[arg-type]
            text=scored,
            processor=session.processor,
            method=method,
            spread=spread_of(spread, calibrated),
            background=background,
            at_least_relevant=at_least_relevant,
            recall=recall or False,
        )
    except ValueError as error:
        raise ValueError(in_flags(error, VISION_FLAGS)) from error


def parse_question(question: str) -> str:
    """The question without surrounding space: as typed, from ``@FILE``, or from standard input for ``-``.

    Raises:
        InputError: if the file cannot be read, or nothing is left.
    """
    text = question.strip()
    if text == "-":
        text = sys.stdin.read().strip()
    elif text.startswith("@"):
        try:
            text = read_text(os.path.expanduser(text[1:])).strip()
        except FileError as error:
            raise InputError(f"--question: {error}; a question that begins with @ has to stand in a file") from error
    if not text:
        raise InputError(f"--question: {question!r} found, wanted some text")
    return text


def parse_sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate`: greedy, unless one of the two is given.

    Raises:
        InputError: if one is out of range.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise InputError(f"--temperature: {temperature} found, wanted a number above 0 (leave it out for greedy)")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p: {top_p} found, wanted a probability in (0, 1]")
    if temperature is None and top_p is None:
        return {"do_sample": False}
    drawn = {"temperature": 1.0 if temperature is None else temperature, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in drawn.items() if value is not None}}


def read_images(files: list[Path]) -> list[Image]:
    """Every image, RGB. Raises InputError at the first that cannot be read."""
    for file in files:
        if os.path.isfile(file) and file.stat().st_size > LARGE:
            console.say(f"reading {file}, {file.stat().st_size / 1e6:.0f} MB")
    return [open_image(file) for file in files]


def in_flags(error: Exception, flags: Mapping[str, str]) -> str:
    """A message of the library with its arguments named as they are typed here."""
    return re.sub(r"\b(?<![-.])(" + "|".join(flags) + r")\b(?!\()", lambda found: flags[found[0]], str(error))


def check_output(file: Path) -> Path:
    """A file to write a figure to. Raises InputError if its folder is missing or its ending is no image format."""
    wanted = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
    if file.suffix.lower() not in wanted:
        raise InputError(f"--output: {file} has the ending {file.suffix!r}, wanted one of {', '.join(wanted)}")
    if not os.path.isdir(file.parent):
        raise InputError(f"--output: {file.parent} is not a folder, wanted an existing one")
    if os.path.isdir(file):
        raise InputError(f"--output: {file} is a folder, wanted a file")
    return file
