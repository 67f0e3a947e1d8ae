"""`asymvlm verify`: proof on a model as it runs here that pruning and eviction equal masking, and leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asymvlm.app.session import InputError, Session
from asymvlm.cli import console, options
from asymvlm.files.json_files import first_line
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.verification import verify as verify_model
from asymvlm.verification.samples import QUESTION, drawn_picture


def verify(
    *,
    model: str,
    image: list[Path] | None,
    question: str | None,
    keep: str | None,
    budget: Path | None,
    scorer: str | None,
    any_model: bool,
    scored: options.ScoredText,
    spread: bool | None,
    at_least_relevant: bool,
    steps: int,
    attention: str | None,
    as_json: bool,
    **loading: Any,
) -> int:
    """Verify on this machine that a pruned run is the masked run of the same tokens. Exit code 1 if a check fails."""
    learned = options.load_scorer(scorer)
    chosen = options.parse_budget_of(learned, keep, budget)
    text = options.parse_question(QUESTION if question is None else question)
    images = options.read_images(image) if image else [drawn_picture()]
    with console.stdout_reserved(as_json):
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        if attention is not None:
            _set_attention(session, attention)
        inputs = session.prepare(images, text)
        try:
            vision = options.vision_settings(
                *(session, learned, any_model, chosen, scored), spread=spread, at_least_relevant=at_least_relevant
            )
            result = verify_model(session.model, inputs, vision=vision, steps=steps, progress=_tell)
        except ValueError as error:
            raise InputError(f"cannot verify {session.name}: {error}") from error
    if as_json:
        record: dict[str, Any] = {"name": session.name, "question": text, "budget": budget_to_dict(vision.budget)}  # type: ignore[arg-type]
        console.print_json(record | result.to_dict())
    else:
        console.out.print(str(result), markup=False, soft_wrap=True)
    return 0 if result.passed else console.EXIT_FAILED


def _set_attention(session: Session, name: str) -> None:
    try:
        session.model.set_attn_implementation(name)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"--attn: {session.name} cannot use {name!r}: {first_line(error)}") from error


def _tell(words: str) -> None:
    console.err.print(f"verify: {words}", markup=False)
