"""`asymvlm evaluate`: compare methods on questions with answers, and print the table."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from asymvlm.app.session import InputError
from asymvlm.cli import console, data, options
from asymvlm.cli.evaluation_tables import duration, plan_lines, show
from asymvlm.evaluation.arms import COSINE, Arm, Choices, check_choices
from asymvlm.evaluation.page import check_page, write_report
from asymvlm.evaluation.plan import Limits, Plan, check_samples, make_plan
from asymvlm.evaluation.run import run, timed


def evaluate(
    *,
    model: str,
    samples: Path | None,
    dataset: str | None,
    split: str,
    columns: str,
    limit: int | None,
    methods: str,
    keep: str,
    cache: str | None,
    metric: list[str] | None,
    baseline: str | None,
    output: Path | None,
    report: Path | None,
    scorer: str | None,
    any_model: bool,
    spread: bool | None,
    at_least_relevant: bool,
    scored: options.ScoredText,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    config: Path | None,
    dry_run: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Compare methods on your own questions. Interrupted, the same command goes on."""
    if output is None and not dry_run:
        raise InputError("no --out found, wanted a folder for the results")
    folder = None if output is None else data.check_folder(output, "--out")
    page = None if report is None else _page(report)
    limits = Limits(tuple(metric or ["exact"]), baseline, batch_size, max_new_tokens, seed)
    learned = options.load_scorer(scorer)
    choices = _choices(_names("--method", methods), _names("--keep", keep), _names("--cache", cache or ""))
    scores: dict[str, Any] = {
        "scorer": learned,
        "spread": spread,
        "at_least_relevant": at_least_relevant,
        "text": scored,
    }
    choices = replace(choices, **scores, seed=seed)
    _check(choices)
    questions = data.read_samples(samples, dataset, split, columns, limit)
    check_samples(questions, limits)
    with console.stdout_reserved(as_json), console.interruptible():
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        choices = replace(choices, scorer=_vouched(learned, session, any_model))
        plan = make_plan(session, questions, choices, limits)
        try:
            found = timed(plan, time.perf_counter) if folder is None or dry_run else run(plan, folder, progress=True)
            if page is not None and not isinstance(found, dict):
                write_report(found, page, plan)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was answered is in {folder}, the same command goes on from there"
            ) from interrupt
    if isinstance(found, dict):
        _show_plan(plan, found, as_json)
    elif as_json:
        console.print_json(found.to_dict())
    else:
        show(found)
        if page is not None:
            console.print_line(f"wrote {page}")


def _choices(methods: list[str], keep: list[str], cache: list[str]) -> Choices:
    return Choices({name: name for name in methods}, tuple(keep), {name: name for name in cache})


def _check(choices: Choices) -> None:
    """What can be checked before a model is loaded."""
    try:
        check_choices(choices)
    except InputError as error:
        raise InputError(options.in_flags(error, {"keep": "--keep", "methods": "--method"})) from error
    scoring, named = {"asymvlm"} & {*choices.methods}, f"found beside --method {','.join(choices.methods)}"
    if choices.scorer is not None and not scoring:
        raise InputError(f"--scorer is that of the method 'asymvlm', {named}")
    if not scoring | ({COSINE} & {*choices.methods}):
        for flag, asked in {"--spread": choices.spread, "--at-least-relevant": choices.at_least_relevant}.items():
            if asked:
                raise InputError(f"{flag} acts on 'asymvlm' and {COSINE!r}, {named}")


def _show_plan(plan: Plan, seconds: dict[Arm, float], as_json: bool) -> None:
    """Say what a run would do, and how long it would take by one batch of each setting."""
    estimate = sum(seconds.values()) * len(plan.batches)
    if as_json:
        arms = [{"method": arm.method, "keep": arm.keep, "seconds": seconds[arm]} for arm in plan.arms.arms]
        told = {"samples": len(plan.samples), "batches": len(plan.batches), "generations": plan.generations}
        console.print_json({**told, "arms": arms, "skipped": plan.arms.skipped, "estimated_seconds": estimate})
        return
    for line in plan_lines(plan):
        console.print_line(line)
    console.print_line(
        f"about {duration(estimate)}, by one batch of {len(plan.batches[0])} under each setting; answers may be longer"
    )


def _names(option: str, text: str) -> list[str]:
    """What stands between commas. Raises InputError for a name that stands there twice."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if len(set(names)) < len(names):
        raise InputError(f"{option}: {text} found, wanted each once")
    if not names and option != "--cache":
        raise InputError(f"{option}: {text!r} found, wanted one or more, with commas between")
    return names


def _page(file: Path) -> Path:
    try:
        return check_page(file)
    except InputError as error:
        raise InputError(options.in_flags(error, {"report": "--report"})) from error


def _vouched(scorer: Any, session: Any, any_model: bool) -> Any:
    try:
        return options.vouched(scorer, session, any_model)
    except ValueError as error:
        raise InputError(f"--scorer: {error}") from error
