"""`asymvlm train`: learn the weight of a model from questions about images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from asymvlm.app.samples import prepare_with_answer
from asymvlm.app.session import InputError
from asymvlm.cli import console, data, options
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.training import TrainingSettings, train_scorer

FLAGS = {
    "keep_ratio": "--keep",
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "temperature": "--temperature",
    "strength": "--strength",
    "patience": "--patience",
    "masked_rows": "--masked-rows",
    "resume=False": "--restart",
}


def train(
    *,
    model: str,
    output: Path,
    samples: Path | None,
    dataset: str | None,
    split: str,
    columns: str,
    limit: int | None,
    validation: Path | None,
    preset: str,
    keep: str | None,
    epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    temperature: float | None,
    strength: float | None,
    patience: int | None,
    seed: int,
    masked_rows: str | None,
    checkpointing: bool,
    save_every: int,
    restart: bool,
    scored: options.ScoredText,
    as_json: bool,
    **loading: Any,
) -> None:
    """Train a scorer. Interrupted, the same command goes on; under torchrun, all processes train one weight."""
    given: dict[str, Any] = {
        "keep_ratio": _ratios(keep),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "temperature": temperature,
        "strength": strength,
        "patience": patience,
        "masked_rows": masked_rows,
        "gradient_checkpointing": checkpointing or None,
    }
    try:
        changes = {name: value for name, value in given.items() if value is not None}
        settings = TrainingSettings.named(preset, seed=seed, **changes)
    except ValueError as error:
        raise InputError(options.in_flags(error, FLAGS)) from error
    questions = data.read_samples(samples, dataset, split, columns, limit)
    held_out = None if validation is None else data.read_samples(validation, None, split, columns, None)
    folder = data.check_folder(output, "--output")
    without_answer = data.note_answers(questions)
    with console.stdout_reserved(as_json), _ranks() as is_first, console.interruptible():
        console.hush_transformers(progress=not as_json)
        session = console.open_session(model, **loading)
        facts = {"samples_without_answer": without_answer, "chat_template": session.has_chat_template}
        try:
            scorer = train_scorer(
                session.model,
                questions,
                settings,
                text=scored,
                processor=session.processor,
                collate=lambda part: prepare_with_answer(session, part[0]),
                validation=held_out,
                checkpoint=folder / "state",
                resume=not restart,
                save_every=save_every,
                record=facts,
                data=str(samples or f"{dataset}[{split}]"),
            )
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"cannot train on {session.name}: {options.in_flags(error, FLAGS)}") from error
        if is_first:
            scorer.save_pretrained(folder)
    if not is_first:
        return
    if as_json:
        console.print_json(
            {
                "model": session.name,
                "output": str(folder),
                "samples": len(questions),
                **facts,
                "budget": budget_to_dict(scorer.budget),  # type: ignore[arg-type]
                "mean_gap": scorer.gaps and scorer.gaps.mean,
                "weight": {"minimum": float(scorer.weight.min()), "maximum": float(scorer.weight.max())},
                **{name: scorer.training[name] for name in ("steps", "stopped_early", "evaluations", "clamped_share")},
            }
        )
    else:
        losses = [entry["train"] for entry in scorer.training["evaluations"]]
        console.out.print(f"loss by epoch: {', '.join(f'{loss:.4g}' for loss in losses)}\nwrote {folder}", markup=False)


@contextlib.contextmanager
def _ranks() -> Iterator[bool]:
    """Join the other processes that torchrun started; True on the first one, and where there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _ratios(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--keep: {text} found, wanted ratios in (0, 1) like 0.5 or 0.3,0.5") from error
