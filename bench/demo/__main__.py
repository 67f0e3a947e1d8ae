"""One page, one question, half the vision tokens: what pruning saves, as a table and a picture. Needs no network.

With no options it builds a LLaVA-class checkpoint with random weights, once, and draws its own page. ``--model``,
``--image`` and ``--question`` take the reader's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from asymvlm import plot
from asymvlm.cli import console, options
from asymvlm.cli.run import ask, show
from asymvlm.loading import load, open_image, visible_region
from asymvlm.session import InputError
from bench.demo.checkpoint import cached_checkpoint
from bench.demo.page import QUESTION, render_page

MAX_NEW_TOKENS = 16
RUNS = 9  # pairs timed: a few seconds, enough to shrug off a busy machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the demo's random checkpoint.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; by default a page the demo draws.")] = None,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    keep: options.KeepOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the page and the heatmap.")] = Path("demo_output"),
) -> None:
    """Prune the vision tokens of a page and show what that saves."""
    console.configure_logging(verbose=False)
    budget = options.parse_budget(keep, None)
    text = options.parse_question(question)
    page = render_page() if image is None else open_image(image)
    try:
        output.mkdir(parents=True, exist_ok=True)
        page.save(output / "demo_page.png")
    except OSError as error:
        raise InputError(f"--output: cannot write to {output} ({error.strerror}), wanted a folder") from error
    console.hush_transformers(progress=True)
    session = load(model or str(_own_checkpoint()))
    outcome = ask(session, [page], text, budget, max_new_tokens=MAX_NEW_TOKENS, compare=True, runs=RUNS)
    console.out.print(text, style="bold", markup=False)
    if model is None:
        console.out.print("The weights are random: the answers and the heatmap mean nothing, the savings are real.")
    show(session, outcome)
    console.out.print(f"wrote {output / 'demo_page.png'}", markup=False, soft_wrap=True)
    try:
        figure = plot.report_heatmap(
            outcome.report, visible_region(page, session.processor.image_processor), question=text
        )
    except (plot.PlotDependencyError, ValueError) as error:
        console.err.print(f"no heatmap: {error}", markup=False)
        return
    if model is None:
        figure.suptitle(f"{figure.get_suptitle()}\nrandom weights: the pattern means nothing", fontsize=11)
    figure.savefig(output / "demo_heatmap.png", bbox_inches="tight")
    console.out.print(f"wrote {output / 'demo_heatmap.png'}", markup=False, soft_wrap=True)


def _own_checkpoint() -> Path:
    with console.err.status("building the demo's checkpoint, once"):
        try:
            return cached_checkpoint()
        except OSError as error:
            raise InputError(f"the demo's checkpoint cannot be written: {error}, set XDG_CACHE_HOME") from error


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.demo"))
