"""Pruned and full answers about a page, with bytes and a heatmap; then what pruning saves in time. Needs no network.

With no options a small VLM, trained from scratch on pages like this one (`bench/tinyvlm`), reads a page it never saw
with a learned scorer, and a model with random weights, large enough for prefill to dominate, is timed. ``--model``,
``--image`` and ``--question`` take the reader's; the reader's model is then timed itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from asymvlm.app.loading import load, open_image
from asymvlm.app.session import InputError, Session
from asymvlm.cli import console, options
from asymvlm.cli.heatmap import draw_images
from asymvlm.cli.run import Outcome, ask, show
from asymvlm.cli.tables import bytes_in_words
from asymvlm.report import plot
from asymvlm.settings.scorer import Scorer
from asymvlm_cli.options import Keep
from asymvlm_kernels import UniformBudget
from bench.demo.sample import SCORER, Example, example, measured_rate
from bench.demo.timed import DEFAULT_SIZE, SIZES, Timed, time_first_token, verdict
from bench.tinyvlm.model import CHECKPOINT

ANY_QUESTION = "read the page"  # where the page is the reader's, and the question is not
MAX_NEW_TOKENS = 80
RUNS = 9  # pairs of the reader's own model, which stop after a minute
NO_SIZE = "none"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the small VLM of bench/tinyvlm.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; by default a page the demo draws.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    page: Annotated[
        int | None, typer.Option(help="Number of another page that the demo draws, 0 to 999; instead of --image.")
    ] = None,
    keep: Keep = None,
    size: Annotated[
        str, typer.Option(help=f"Model with random weights to time without --model: {', '.join([*SIZES, NO_SIZE])}.")
    ] = DEFAULT_SIZE,
    output: Annotated[Path, typer.Option(help="Folder for the page and the heatmap.")] = Path("demo_output"),
) -> None:
    """Prune the vision tokens of a page and show what that saves."""
    console.configure_logging(verbose=False)
    budget = options.parse_budget(keep, None)
    assert isinstance(budget, UniformBudget)
    if size not in (*SIZES, NO_SIZE):
        raise InputError(f"--size: {size!r} found, wanted one of {', '.join([*SIZES, NO_SIZE])}")
    if image is not None and page is not None:
        raise InputError(f"--image {image} and --page {page} exclude each other, wanted one of them")
    own = example(page) if image is None else None
    picture = own.page if own is not None else open_image(image)  # type: ignore[arg-type]
    text = options.parse_question((own.question if own else ANY_QUESTION) if question is None else question)
    try:
        output.mkdir(parents=True, exist_ok=True)
        picture.save(output / "demo_page.png")
    except OSError as error:
        raise InputError(f"--output: cannot write to {output} ({error.strerror}), wanted a folder") from error
    session, outcome = _answer(model, picture, text, budget)
    console.out.print(f"\n{text}", style="bold", markup=False)
    if model is None:
        show(session, dataclasses.replace(outcome, first_token=None))  # so small a model's time is mostly overhead
    else:
        show(session, outcome)
        assert outcome.first_token is not None
        _print(verdict(outcome.first_token))
    _print(_judgement(own if own is not None and text == own.question else None, outcome))
    if model is None:
        if own is not None and text == own.question:
            _print(f"One sample: {own.chosen}. --page shows another.")
            _print(measured_rate(budget.ratio))
        _print(
            "This model is tiny (0.65 M parameters, 144 vision tokens) and reads only pages of this kind, so it shows "
            "answers and bytes, not times."
        )
    _write_figures(session, outcome, picture, text, output)
    if model is None and size != NO_SIZE:
        console.out.print()
        _show_times(time_first_token(SIZES[size], budget, _print))


def _answer(model: str | None, picture: Any, text: str, budget: UniformBudget) -> tuple[Session, Outcome]:
    """Both answers; the reader's model is timed as well, the small one is not."""
    console.hush_transformers(progress=True)
    _print(f"loading {model or 'the small trained VLM'}")
    session = load(model or str(CHECKPOINT))
    share = f"with all and with {budget.ratio:.0%} of the vision tokens"
    if model is not None:
        _print(f"answering {share}, then timing both in turn: up to {RUNS} pairs or about a minute")
        return session, ask(session, [picture], text, budget, max_new_tokens=MAX_NEW_TOKENS, compare=True, runs=RUNS)
    _print(f"answering {share}")
    session = dataclasses.replace(session, name="bench/tinyvlm/checkpoint")
    scorer = Scorer.from_pretrained(SCORER)
    return session, ask(
        session, [picture], text, budget, scorer=scorer, max_new_tokens=MAX_NEW_TOKENS, compare=True, runs=1
    )


def _judgement(own: Example | None, outcome: Outcome) -> str:
    """The answers beside each other and, where it is known, beside what the page says."""
    assert outcome.full is not None
    full, pruned = outcome.full.text, outcome.pruned.text
    advice = "Try a larger --keep (python -m bench.demo --keep 0.75), or a scorer for the model (asymvlm train)."
    if own is None:
        return "The answers agree." if full == pruned else f"The answers differ. {advice}"
    if full == pruned == own.answer:
        return f"The page says {own.answer}: both answers are right."
    said = f"The page says {own.answer}; the model answers {full} with all tokens, {pruned} with the kept ones."
    return f"{said} {advice}" if full == own.answer else f"{said} It misses some pages with all tokens too."


def _show_times(timed: Timed) -> None:
    """Times with their spread, bytes, and whether the times differ."""
    timing = timed.first_token
    table = Table(
        title=f"LLaVA shape, {timed.parameters / 1e9:.2g} B random weights: shows time and bytes, not answers",
        title_justify="left",
        title_style="bold",
        caption=f"Time to first token, on a CPU with one thread: {timing.method}. The tower is small here; "
        "a large one takes time that pruning does not shorten.",
        caption_justify="left",
    )
    for name in ("", "full", "pruned"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("vision tokens", f"{timed.vision_tokens:,}", f"{timed.kept:,}")
    sizes = (timing.full_kv_bytes, timing.pruned_kv_bytes)
    table.add_row("K/V cache after prefill, measured", *(bytes_in_words(size) for size in sizes if size is not None))
    table.add_row("time to first token, median", f"{timing.full_median_ms:.0f} ms", f"{timing.pruned_median_ms:.0f} ms")
    runs = (timing.full_ms, timing.pruned_ms)
    table.add_row("fastest to slowest run", *(f"{min(times):.0f} to {max(times):.0f} ms" for times in runs))
    console.out.print(table)
    _print(verdict(timing))


def _write_figures(session: Session, outcome: Outcome, picture: Any, text: str, output: Path) -> None:
    """The heatmap beside the page, which is there already; without matplotlib one line says so."""
    _print(f"wrote {output / 'demo_page.png'}")
    try:
        ((figure, _),) = draw_images(session, outcome, [picture], text)
    except (plot.PlotDependencyError, ValueError) as error:
        console.err.print(f"no heatmap: {error}", markup=False)
        return
    figure.savefig(output / "demo_heatmap.png", bbox_inches="tight")
    _print(f"wrote {output / 'demo_heatmap.png'}")


def _print(line: str) -> None:
    console.out.print(line, markup=False, soft_wrap=True)
