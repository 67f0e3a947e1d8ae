"""`asymvlm heatmap`: draw which patches the scorer wants for a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asymvlm import plot
from asymvlm.budget_file import budget_to_dict
from asymvlm.cli import console, options, tables
from asymvlm.cli.run import ask
from asymvlm.loading import visible_region
from asymvlm.session import InputError


def heatmap(
    model: options.ModelOption,
    image: Annotated[Path, typer.Option("--image", "-i", help="Image file.")],
    question: options.QuestionOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, PDF, SVG or JPEG to write.")],
    keep: options.KeepOption = None,
    budget: options.BudgetOption = None,
    scorer: options.ScorerOption = None,
    scored: options.TextOption = "all",
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Draw the importance of every patch over the image, with the kept patches outlined and the gap in the title."""
    learned = options.load_scorer(scorer)
    chosen = options.parse_budget_of(learned, keep, budget)
    text = options.parse_question(question)
    file = options.check_output(output)
    picture = options.read_images([image])[0]
    try:
        plot.require_matplotlib()
    except plot.PlotDependencyError as error:
        raise InputError(str(error)) from error
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, dtype=dtype, device=device)
        report = ask(
            session, [picture], text, chosen, scorer=learned, scored=scored, max_new_tokens=1, compare=False
        ).report
        try:
            grid = plot.patch_grid(report)[2]
            seen = visible_region(picture, session.processor.image_processor)
            figure = plot.report_heatmap(report, seen, question=text)
        except ValueError as error:
            raise InputError(f"cannot draw {model}: {error}") from error
        try:
            figure.savefig(file, bbox_inches="tight")
        except OSError as error:
            raise InputError(f"--output: cannot write {file} ({error.strerror})") from error
    if as_json:
        console.print_json(
            {
                "model": session.name,
                "question": text,
                "budget": budget_to_dict(report.budget),
                "output": str(file),
                "grid": list(grid),
                "gap": report.to_dict()["gap"][0],
                "tier": report.tier[0],
                "kept": report.kept[0],
                "vision_tokens": report.vision_tokens[0],
            }
        )
    else:
        console.out.print(f"{tables.decision_line(report)}\nwrote {file}", markup=False, soft_wrap=True)
