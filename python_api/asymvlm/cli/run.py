"""`asymvlm run`: ask a model about images with part of the vision tokens, and show what that saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from asymvlm.app.session import FirstToken, Generation, InputError, Session
from asymvlm.cli import console, options, tables
from asymvlm.hf.arguments import IDS
from asymvlm.methods import BeforeMethod, InsideMethod
from asymvlm.patch import patch
from asymvlm.settings.budget_file import AnyBudget, budget_to_dict
from asymvlm.settings.eviction import TextEviction
from asymvlm.settings.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one question gave. ``full`` and ``first_token`` are there if a comparison was asked for."""

    pruned: Generation
    report: Any
    input_ids: Any  # (1, S) of the prompt
    full: Generation | None = None
    first_token: FirstToken | None = None


def run(
    *,
    model: str,
    image: list[Path],
    question: str,
    keep: str | None,
    budget: Path | None,
    scorer: str | None,
    any_model: bool,
    scored: options.ScoredText,
    spread: bool | None,
    at_least_relevant: bool,
    method: str | None,
    text_threshold: int | None,
    text_retention: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    compare: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Ask a question about images with pruned vision tokens, and show what was saved."""
    learned = options.load_scorer(scorer)
    way = options.parse_method(method, learned)
    own = way is not None and way.budget is not None and keep is None and budget is None
    chosen = None if own else options.parse_budget_of(learned, keep, budget)
    text = options.parse_question(question)
    eviction = options.parse_text_eviction(text_threshold, text_retention)
    sampling = options.parse_sampling(temperature, top_p)
    images = options.read_images(image)
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        outcome = ask(
            session,
            images,
            text,
            chosen,
            scorer=learned,
            any_model=any_model,
            scored=scored,
            spread=spread,
            at_least_relevant=at_least_relevant,
            method=way,
            eviction=eviction,
            max_new_tokens=max_new_tokens,
            compare=compare,
            sampling=sampling,
            seed=seed,
        )
    if as_json:
        console.print_json(to_record(session, outcome, text, outcome.report.budget))
    else:
        show(session, outcome)


def ask(
    session: Session,
    images: list[Any],
    question: str,
    budget: AnyBudget | None,
    *,
    max_new_tokens: int,
    compare: bool,
    scorer: Scorer | None = None,
    any_model: bool = False,
    scored: options.ScoredText = "all",
    spread: bool | None = None,
    at_least_relevant: bool = False,
    method: BeforeMethod | InsideMethod | None = None,
    eviction: TextEviction | None = None,
    runs: int = 5,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
) -> Outcome:
    """Generate with pruning and, to compare, without; then time both to the first token, ``runs`` times each.

    Without a budget the scorer's own is used. ``any_model`` takes a scorer to a model it was not trained for. Both
    answers are drawn from ``seed``, where ``sampling`` (arguments of `generate`) draws at all.

    Raises:
        InputError: if the processor refuses the prompt, its template hides the user's turns, or the model cannot be
            patched.
    """
    inputs = session.prepare(images, question)
    try:
        vision = options.vision_settings(
            *(session, scorer, any_model, budget, scored, method), spread=spread, at_least_relevant=at_least_relevant
        )
        handle = patch(session.model, vision=vision, text=eviction)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"cannot prune {session.name}: {error}") from error
    with handle:
        try:
            pruned = session.generate(inputs, max_new_tokens, seed=seed, **(sampling or {}))
        except NotImplementedError as error:  # of a method, for this model or these images
            raise InputError(f"cannot prune {session.name}: {error}") from error
        report = handle.last
        if not compare:
            return Outcome(pruned, report, inputs[IDS])
        handle.enabled = False
        full = session.generate(inputs, max_new_tokens, seed=seed, **(sampling or {}))
        handle.enabled = True
        return Outcome(pruned, report, inputs[IDS], full, session.first_token(inputs, handle, runs=runs))


def show(session: Session, outcome: Outcome) -> None:
    """Print the answers, the table and the report's notes."""
    table = tables.report_table(
        outcome.report, first_token=outcome.first_token, title=f"{session.name} on {session.device}, {session.dtype}"
    )
    if outcome.full is None:
        console.print_text(outcome.pruned.text)
    else:
        console.out.print("[bold]full  [/bold] ", end="")
        console.print_text(outcome.full.text)
        console.out.print("[bold]pruned[/bold] ", end="")
        console.print_text(outcome.pruned.text)
    console.out.print()
    console.out.print(table)
    console.print_line(tables.decision_line(outcome.report))
    if outcome.report.eviction is not None:
        console.print_line(tables.eviction_line(outcome.report.eviction))
    for note in outcome.report.notes:
        console.print_line(f"note: {note}")


def to_record(session: Session, outcome: Outcome, question: str, budget: AnyBudget) -> dict[str, Any]:
    """The same as JSON. Times in milliseconds, sizes in bytes."""
    record: dict[str, Any] = {
        "model": session.name,
        "device": str(session.device),
        "dtype": session.dtype,
        "question": question,
        "chat_template": session.has_chat_template,
        "budget": budget_to_dict(budget),
        "answer": outcome.pruned.text,
        "new_tokens": outcome.pruned.new_tokens,
        "report": outcome.report.to_dict(),
    }
    if outcome.full is not None and outcome.first_token is not None:
        timing = outcome.first_token
        record["compare"] = {
            "answer_full": outcome.full.text,
            "new_tokens_full": outcome.full.new_tokens,
            "first_token_ms": {
                "full": timing.full_median_ms,
                "pruned": timing.pruned_median_ms,
                "full_runs": timing.full_ms,
                "pruned_runs": timing.pruned_ms,
                "method": timing.method,
            },
            "kv_bytes": {"full": timing.full_kv_bytes, "pruned": timing.pruned_kv_bytes},
        }
    return record
