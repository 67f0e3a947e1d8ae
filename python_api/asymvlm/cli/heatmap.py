"""`asymvlm heatmap`: draw which patches the scorer wants for a question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asymvlm.app.session import InputError, Session
from asymvlm.cli import console, options, tables
from asymvlm.cli.run import Outcome, ask
from asymvlm.report import plot
from asymvlm.report.placed import placed
from asymvlm.settings.budget_file import budget_to_dict


def heatmap(
    *,
    model: str,
    image: list[Path],
    question: str,
    output: Path,
    keep: str | None,
    budget: Path | None,
    scorer: str | None,
    any_model: bool,
    scored: options.ScoredText,
    spread: bool | None,
    at_least_relevant: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Draw the importance of every patch over the image, with the kept patches outlined and the gap in the title."""
    learned = options.load_scorer(scorer)
    chosen = options.parse_budget_of(learned, keep, budget)
    text = options.parse_question(question)
    file = options.check_output(output)
    pictures = options.read_images(image)
    try:
        plot.require_matplotlib()
    except plot.PlotDependencyError as error:
        raise InputError(str(error)) from error
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        asked = ask(
            *(session, pictures, text, chosen),
            scorer=learned,
            any_model=any_model,
            scored=scored,
            spread=spread,
            at_least_relevant=at_least_relevant,
            max_new_tokens=1,
            compare=False,
        )
        drawn = _draw(session, asked, pictures, text, file)
    report = asked.report
    if as_json:
        facts = {"question": text, "budget": budget_to_dict(report.budget), "chat_template": session.has_chat_template}
        told = {"gap": report.to_dict()["gap"][0], "tier": report.tier[0], "vision_tokens": report.vision_tokens[0]}
        console.print_json(
            {"model": session.name, **facts, **drawn[0], **told, "kept": report.kept[0], "images": drawn}
        )
    else:
        console.print_line(tables.decision_line(report))
        for one in drawn:
            console.print_line(f"wrote {one['output']}")


def _draw(session: Session, asked: Outcome, pictures: list[Any], question: str, file: Path) -> list[dict[str, Any]]:
    """Draw the images and write them: one to ``file``, several to files numbered from 1."""
    drawn = []
    try:
        for number, (figure, grid) in enumerate(draw_images(session, asked, pictures, question), 1):
            target = file if len(pictures) == 1 else file.with_stem(f"{file.stem}-{number}")
            figure.savefig(target, bbox_inches="tight")
            drawn.append({"output": str(target), "grid": list(grid)})
    except ValueError as error:
        raise InputError(f"cannot draw {session.name}: {error}") from error
    except OSError as error:
        raise InputError(f"--output: cannot write {target} ({error.strerror})") from error
    return drawn


def draw_images(
    session: Session, asked: Outcome, pictures: list[Any], question: str
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """A figure of each of the images that a question was asked about, and its grid, tiles put together.

    Raises:
        ValueError: if there is nothing to draw, or it is not known where tokens lie.
    """
    report = asked.report
    for seen, page in placed(report, session.processor, asked.input_ids, pictures):
        height, width = report.image_grids[0][page.tiles[0]]
        grid = (page.rows * height, page.columns * width)
        yield plot.report_heatmap(report, seen, page=page, question=question), grid
