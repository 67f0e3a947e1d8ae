"""The learned scorers that the bench compares: ``python -m bench.quality.scorers --model DIR --out DIR``.

Trained by `asymvlm.training.train_scorer` on pages of the ``scorer`` split, which neither the model, the calibration
nor the test has seen. One folder for each recipe and seed; those there already are left alone.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from asymvlm.app.session import InputError
from asymvlm.cli import console
from asymvlm.settings.scorer import Scorer
from asymvlm.training import TrainingSettings, train_scorer
from bench.tinyvlm.evaluate import Samples, make_samples
from bench.tinyvlm.glyphs import BOS, IMAGE
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION, to_model_pixels

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 1500  # as many as the paper takes
SCORERS = Path(__file__).parent / "scorers"  # of the committed checkpoint
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a scorer is trained. ``answers``: compare hidden states of the right answer too, not the prompt's alone."""

    label: str
    preset: str
    answers: bool
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


RECIPES = {
    "paper": Recipe("learned (paper)", "paper", answers=False),
    "default": Recipe("learned (default)", "default", answers=True),
    "warm": Recipe(
        "default with tau 1 and three slower passes",
        "default",
        answers=True,
        changes={"temperature": 1.0, "learning_rate": 1e-2, "epochs": 3},
    ),
    # the pass under the soft mask over text rows alone; and pages of all densities
    "rows": Recipe("default, text rows", "default", answers=True, changes={"masked_rows": "text"}),
    # one change each from the paper's preset
    "paper_answers": Recipe("paper preset, answers compared", "paper", answers=True),
    "paper_theta": Recipe("paper preset, gradient through theta", "paper", answers=False, changes={"theta_grad": True}),
}
PRESETS = ("paper", "default")  # what is trained where nothing is asked for


def model_inputs(samples: Samples, rows: Sequence[int], *, answers: bool = True) -> dict[str, torch.Tensor]:
    """What ``model(**inputs)`` takes for some samples, padded on the right; the answer is labelled, or left out."""
    chosen = torch.as_tensor(rows)
    text, labels = samples.text[chosen], samples.labels[chosen]
    real = samples.question[chosen] | (labels >= 0) if answers else samples.question[chosen]
    length = int(real.sum(1).max())
    count = len(rows)
    head = torch.cat([torch.full((count, 1), BOS), torch.full((count, NUM_VISION), IMAGE)], 1)
    inputs = {
        "input_ids": torch.cat([head, text[:, :length]], 1),
        "attention_mask": torch.cat([torch.ones_like(head), real[:, :length].long()], 1),
        "pixel_values": to_model_pixels(samples.pages.pixels[chosen.numpy()]),
    }
    if answers:
        inputs["labels"] = torch.cat([torch.full_like(head, -100), labels[:, :length]], 1)
    return inputs


def train_one(
    model: Any, settings: TrainingSettings, *, answers: bool, samples: int = SAMPLES, **options: Any
) -> Scorer:
    """One scorer; its data differ with the seed of ``settings``, as three runs of a user would."""
    data = make_samples("scorer", samples, seed=settings.seed)
    size = min(8, settings.batch_size)
    scorer = train_scorer(
        model,
        range(samples),
        settings,
        collate=lambda rows: model_inputs(data, rows, answers=answers),
        micro_batch_size=size,
        data=f"bench.tinyvlm pages, split scorer, seed {settings.seed}, {'with' if answers else 'without'} answers",
        **options,
    )
    return portable(scorer)


def portable(scorer: Scorer) -> Scorer:
    """The same with the model's folder told from the root of the repository: elsewhere it lies under another path."""
    folder = Path(scorer.base.model_id).resolve()
    name = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name
    return scorer.replace(base=dataclasses.replace(scorer.base, model_id=name))


def load_model(folder: Path) -> Any:
    """The model in evaluation mode, on the CPU, in fp32."""
    from transformers import AutoModelForImageTextToText

    if not (folder / "config.json").is_file():
        raise InputError(f"--model: {folder} holds no checkpoint, wanted a folder of bench.tinyvlm.train")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Checkpoint to train for.")] = CHECKPOINT,
    out: Annotated[Path, typer.Option(help="Folder of the scorers.")] = SCORERS,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipe to train, two by default; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed to train, three by default; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples.")] = SAMPLES,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves its own choice.")] = 0,
) -> None:
    """Train the scorers that are missing."""
    console.hush_transformers(progress=False)
    if threads:
        torch.set_num_threads(threads)
    network = load_model(model)
    for name in recipe or PRESETS:
        if name not in RECIPES:
            raise InputError(f"--recipe: {name!r} found, wanted one of {', '.join(RECIPES)}")
        how = RECIPES[name]
        for number in SEEDS if seed is None else seed:
            folder = out / f"{name}-{number}"
            if (folder / "config.json").exists():
                continue
            settings = TrainingSettings.named(how.preset, seed=number, **how.changes)
            train_one(network, settings, answers=how.answers, samples=samples).save_pretrained(folder)
            console.out.print(f"wrote {folder}", markup=False)


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.quality.scorers"))
