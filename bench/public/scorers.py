"""Scorers of the model trained on easy-vqa, by the library's own recipe: `asymvlm.training.train_scorer`, its presets.

They are trained on images that neither the model, the calibration nor the test has seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asymvlm.settings.scorer import Scorer
from asymvlm.training import TrainingSettings, train_scorer
from bench.public.easy_vqa import make_samples
from bench.quality.scorers import RECIPES, model_inputs, portable

SAMPLES = 800  # 200 images, four questions each
PRESETS = {"default": (0,)}  # the seeds of each recipe


def trained(model: Any, folder: Path, recipe: str, seed: int, samples: int = SAMPLES) -> Scorer:
    """The scorer of a recipe and seed; read from ``folder`` where an earlier call left it."""
    place, how = folder / f"{recipe}-{seed}", RECIPES[recipe]
    if not (place / "config.json").is_file():
        data = make_samples("scorer", samples, seed=seed)
        settings = TrainingSettings.named(how.preset, seed=seed, **how.changes)
        scorer = train_scorer(
            model,
            range(samples),
            settings,
            collate=lambda rows: model_inputs(data, rows, answers=how.answers),
            micro_batch_size=min(8, settings.batch_size),
            data=f"easy-vqa, training images 3500 to 3699, seed {seed}, {'with' if how.answers else 'without'} answers",
        )
        portable(scorer).save_pretrained(place)
    return Scorer.from_pretrained(place)


__all__ = ["PRESETS", "SAMPLES", "trained"]
