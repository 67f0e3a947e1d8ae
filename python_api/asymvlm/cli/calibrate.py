"""`asymvlm calibrate`: fit the budget of a scorer on questions with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from asymvlm.app.metrics import METRICS
from asymvlm.app.samples import Prompts
from asymvlm.app.session import InputError
from asymvlm.calibration import Calibration, calibrate_budget
from asymvlm.cli import console, data, options
from asymvlm_kernels import Spread

FLAGS = {name: f"--{name}" for name in ("average", "minimum", "maximum", "method", "spread", "background")}


def calibrate(
    *,
    model: str,
    output: Path,
    scorer: str | None,
    any_model: bool,
    samples: Path | None,
    dataset: str | None,
    split: str,
    columns: str,
    limit: int | None,
    average: float,
    method: str,
    minimum: float | None,
    maximum: float | None,
    metric: str,
    max_new_tokens: int,
    scored: options.ScoredText,
    spread: bool,
    background: int,
    as_json: bool,
    **loading: Any,
) -> None:
    """Choose the budget that answers best at an average share. Interrupted, the same command goes on."""
    questions = data.read_samples(samples, dataset, split, columns, limit)
    for number, question in enumerate(questions):
        if not question.answers:
            raise InputError(f"sample {number + 1} has no answer, wanted one to judge by")
    if len(questions) < 2:
        raise InputError("1 sample found, wanted two samples or more to compare")
    folder = data.check_folder(output, "--output")
    learned = options.load_scorer(scorer)
    with console.stdout_reserved(as_json), console.interruptible():
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)

        def judge(patched: Any, sample: Any) -> float:
            inputs = {name: value for name, value in sample.items() if name != "answers"}
            return METRICS[metric](session.generate(inputs, max_new_tokens).text, sample["answers"])

        try:
            result = calibrate_budget(
                session.model,
                options.vouched(learned, session, any_model),
                Prompts(session, questions),
                judge,
                average,
                method,
                minimum=minimum,
                maximum=maximum,
                text=scored,
                processor=session.processor,
                spread=Spread() if spread else None,
                background=background,
                checkpoint=folder / "measurements",
            )
        except InputError:
            raise
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was measured is in {folder / 'measurements'}, the same command goes on from there"
            ) from interrupt
        except ValueError as error:
            raise InputError(f"cannot calibrate {session.name}: {options.in_flags(error, FLAGS)}") from error
    record = {**result.scorer.calibration, "chat_template": session.has_chat_template}
    result.scorer.replace(calibration=record).save_pretrained(folder)
    if as_json:
        console.print_json(
            {
                "model": session.name,
                "output": str(folder),
                "judged_by": metric,
                "chat_template": session.has_chat_template,
                **result.to_dict(),
            }
        )
    else:
        _show(result, metric, folder)


def _show(result: Calibration, metric: str, folder: Path) -> None:
    table = Table(title=f"{result.samples} samples, judged by {metric}", title_justify="left")
    for name in ("budget", "kept on average", metric):
        table.add_column(name, justify="left" if name == "budget" else "right")
    for rung in result.ladder:
        table.add_row(f"uniform {rung['keep_ratio']:.3g}", f"{rung['average']:.4f}", f"{rung['metric']:.4f}")
    for row in result.table:
        numbers = (f"{name}={value:.4g}" for name, value in row["budget"].items() if name != "type")
        table.add_row(f"{result.method}: {', '.join(numbers)}", f"{row['average']:.4f}", f"{row['metric']:.4f}")
    console.out.print(table)
    console.out.print(
        f"chosen: {result.budget}\nkeeps {result.average:.4f} on average, {result.difference:+.4f} "
        f"(standard error {result.difference_error:.4f}) against a uniform budget\nwrote {folder}",
        markup=False,
        soft_wrap=True,
    )
