"""One page, one question, half the vision tokens: what pruning saves, as a table and a picture. Needs no network.

With no options a small VLM, trained from scratch on pages like this one (`bench/tinyvlm`), reads a page it never saw
with a learned scorer, and the answers stand beside what is written there. ``--model``, ``--image`` and ``--question``
take the reader's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from asymvlm import plot
from asymvlm.cli import console, options
from asymvlm.cli.run import Outcome, ask, show
from asymvlm.loading import load, open_image, visible_region
from asymvlm.scorer import Scorer
from asymvlm.session import InputError
from bench.quality.scorers import SCORERS
from bench.tinyvlm import questions
from bench.tinyvlm.model import CHECKPOINT
from bench.tinyvlm.pages import make_pages

PAGE_SEED, SCALE = 3, 8  # a page of the split that no training saw, each pixel drawn 8 x 8 so that people can read it
ANY_QUESTION = "read the page"  # where the page is the reader's, and the question is not
MAX_NEW_TOKENS = 80
RUNS = 9  # pairs timed: a few seconds, enough to shrug off a busy machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Example:
    """The demo's own page, a question about it and the answer that is written there."""

    page: Any
    question: str
    answer: str


def example(seed: int = PAGE_SEED) -> Example:
    """The same page and question on every run."""
    pages = make_pages(seed, 1, "test", entries=(8, 8))
    turn = questions.ask(np.random.default_rng(seed), pages.layouts[0], "value")
    return Example(pages.image(0, SCALE), turn.question, turn.answer)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the small VLM of bench/tinyvlm.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; by default a page the demo draws.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    keep: options.KeepOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the page and the heatmap.")] = Path("demo_output"),
) -> None:
    """Prune the vision tokens of a page and show what that saves."""
    console.configure_logging(verbose=False)
    budget = options.parse_budget(keep, None)
    own = example()
    page = own.page if image is None else open_image(image)
    text = options.parse_question((own.question if image is None else ANY_QUESTION) if question is None else question)
    try:
        output.mkdir(parents=True, exist_ok=True)
        page.save(output / "demo_page.png")
    except OSError as error:
        raise InputError(f"--output: cannot write to {output} ({error.strerror}), wanted a folder") from error
    console.hush_transformers(progress=True)
    session = load(model or str(CHECKPOINT))
    scorer = Scorer.from_pretrained(SCORERS / "default-0") if model is None else None
    outcome = ask(session, [page], text, budget, scorer=scorer, max_new_tokens=MAX_NEW_TOKENS, compare=True, runs=RUNS)
    console.out.print(text, style="bold", markup=False)
    show(session, outcome)
    if model is None:
        console.out.print(_caveat(own, text, outcome, own_page=image is None), markup=False)
    console.out.print(f"wrote {output / 'demo_page.png'}", markup=False, soft_wrap=True)
    try:
        figure = plot.report_heatmap(
            outcome.report, visible_region(page, session.processor.image_processor), question=text
        )
    except (plot.PlotDependencyError, ValueError) as error:
        console.err.print(f"no heatmap: {error}", markup=False)
        return
    figure.savefig(output / "demo_heatmap.png", bbox_inches="tight")
    console.out.print(f"wrote {output / 'demo_heatmap.png'}", markup=False, soft_wrap=True)


def _caveat(own: Example, question: str, outcome: Outcome, *, own_page: bool) -> str:
    """What the page says, and what not to conclude."""
    lines = []
    if own_page and question == own.question:
        assert outcome.full is not None
        answers = (("all", outcome.full.text), ("the kept", outcome.pruned.text))
        found = (f"{which} tokens {'right' if text == own.answer else 'WRONG'}" for which, text in answers)
        lines.append(f"The page says {own.answer}: {', '.join(found)}.")
    lines.append(
        "This model is tiny (0.65 M parameters, 144 vision tokens) and reads only pages of this kind: its answers and "
        "the heatmap are real, but its time to first token is mostly overhead. README times a model of 0.4 B."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.demo"))
