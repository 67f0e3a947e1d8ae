"""One page with its question and answer, and how often the model is right on all pages like it.

The page is one of the 1000 that ``python -m bench.quality`` asks about, by a rule that knows nothing of the model's
answers: the first one whose question is for a value. One page proves little, so the rate over all of them, read from
the stored result, belongs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymvlm.app.session import InputError
from bench.harness import results
from bench.quality.scorers import RECIPES, SCORERS
from bench.tinyvlm.evaluate import make_samples

PAGES, PAGES_SEED = 1000, 100  # of python -m bench.quality, whose stored rate stands beside the page
KIND = "value"  # of the first page's question: three digits, where yes or no could be luck
SCALE = 8  # each pixel drawn 8 x 8, so that people can read the page
STORED = Path(__file__).resolve().parents[1] / "results" / "quality" / "seed-0.json"
RECIPE, SEED = "default", 0
SCORER = SCORERS / f"{RECIPE}-{SEED}"


@dataclass(frozen=True)
class Example:
    """A page, a question about it and the answer that is written there; ``chosen`` says why this page."""

    page: Any
    question: str
    answer: str
    chosen: str


def example(number: int | None = None) -> Example:
    """Page ``number`` of the measured ones, or the first that is asked for a value. The same on every run.

    Raises:
        InputError: if there is no such page.
    """
    if number is not None and not 0 <= number < PAGES:
        raise InputError(f"--page: {number} found, wanted a number from 0 to {PAGES - 1}")
    samples = make_samples("test", PAGES, seed=PAGES_SEED)
    if number is None:
        number = next(place for place, turn in enumerate(samples.turns) if turn.kind == KIND)
        chosen = f"page {number} of {PAGES} test pages (seed {PAGES_SEED}), the first whose question asks for a {KIND}"
    else:
        chosen = f"page {number} of {PAGES} test pages (seed {PAGES_SEED}), by --page"
    turn = samples.turns[number]
    return Example(samples.pages.image(number, SCALE), turn.question, turn.answer, chosen)


def measured_rate(keep: float, file: Path = STORED) -> str:
    """How often the model answers rightly over all pages, with all tokens and with ``keep`` of them, in a sentence.

    Every figure and the command are those of ``file``; a ratio or a part that it lacks is said to be unmeasured.
    """
    content = results.load(file)
    measured = content["parts"].get("uniform")
    rates = {} if measured is None else measured["rates"][RECIPES[RECIPE].label]
    if measured is None or f"{keep:g}" not in rates:
        return f"Keep {keep:g} was not measured over many pages (measured: {', '.join(rates) or 'nothing'})."
    rate = rates[f"{keep:g}"]
    command, full = content["runs"][measured["run"]]["command"], measured["full"]["mean"]
    mean = f"mean of {len(rate['runs'])} scorers {rate['mean']:.3f} ± {rate['error']:.3f}"
    return (
        f"Right over all {measured['samples']} pages: {full:.3f} with all tokens, {rate['runs'][SEED]:.3f} with keep "
        f"{keep:g} and this scorer ({mean}); stored by: {command}"
    )
