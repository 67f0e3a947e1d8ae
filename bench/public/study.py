"""What pruning costs in answers on easy-vqa: methods at equal kept tokens, and budgets that adapt to the sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asymvlm import VisionPruning
from asymvlm.app.session import InputError
from asymvlm.calibration import calibrate_budget
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import Spread
from bench.public.easy_vqa import guessed, make_samples, pictures
from bench.quality.beyond import SPREAD
from bench.quality.budgets import adapted, answered, batches
from bench.quality.methods import CONTROL, OTHERS, compared
from bench.quality.statistics import paired, rates_by_kind, record
from bench.quality.study import FULL, Study
from bench.tinyvlm.evaluate import Samples

BLIND = "the question alone"
RATIOS = (0.5, 0.33, 0.22, 0.11)
AVERAGES = (0.33, 0.22)
CALIBRATION = 250  # samples
LADDER = (0.1, 0.22, 0.33, 0.5)  # uniform ratios that a calibration measures
BUDGETS: dict[str, Spread | None] = {"relative threshold": None, "relative threshold, spread along lines": SPREAD}


@dataclass
class KeptStudy(Study):
    """A study that finds the answers of an earlier, interrupted run in a folder."""

    folder: Path | None = None
    seeds: int = 1  # of random choice

    def measure(self, name: str, runs: Sequence[VisionPruning]) -> np.ndarray:
        file = self.folder and self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"
        if file is not None and file.is_file():
            self.right[name] = np.load(file)
        else:
            super().measure(name, runs)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, self.right[name])
        return self.right[name]


def methods(
    study: Study, ours: str, names: Sequence[str] | None = None, ratios: Sequence[float] = RATIOS
) -> dict[str, Any]:
    """Methods that choose before the decoder, all or those of ``names`` with ``ours`` and down-sampling, by kind of
    question; and what a guess without the image gets.

    Raises:
        InputError: on a name that none has.
    """
    known = [*study.methods, *OTHERS]
    for name in names or ():
        if name not in known:
            raise InputError(f"--method: {name!r} found, wanted one of {', '.join(known)}")
    chosen = [name for name in known if names is None or name in (ours, CONTROL, *names)]
    study.right[BLIND] = guessed(pictures("train").turns, study.samples.turns)[None]
    found = compared(study, ours, ratios, chosen)
    return found | {"guessed": study.summary(BLIND)}


def budgets(study: Study, scorers: Sequence[Scorer], cache: Path | None, samples: int = CALIBRATION) -> dict[str, Any]:
    """A relative threshold, calibrated on training images for an average, beside a uniform budget that keeps as many
    tokens of the test samples: of the same scores, and at each average with and without spreading them.
    """
    calibration = batches(make_samples("calibration", samples))
    found: dict[str, Any] = {}
    for average in AVERAGES:
        rows: dict[str, Any] = {}
        for name, spread in BUDGETS.items():
            fitted = [
                calibrate_budget(
                    study.model,
                    scorer,
                    calibration,
                    answered,
                    average,
                    "relative",
                    minimum=0.05,
                    maximum=1.0,
                    ratios=LADDER,
                    spread=spread,
                    checkpoint=None if cache is None else cache / f"calibration-{name}-{number}",
                    progress=False,
                )
                for number, scorer in enumerate(scorers)
            ]
            policies = [VisionPruning(one.scorer, spread=spread) for one in fitted]
            rows[name] = {
                **beside_uniform(study, policies),
                "budgets": [budget_to_dict(one.budget) for one in fitted],
            }
        found[f"{average:g}"] = rows
    return {"calibration_samples": samples, "full": study.summary(FULL), "averages": found}


def beside_uniform(study: Study, policies: Sequence[VisionPruning]) -> dict[str, Any]:
    """What `adapted` finds, the difference to all tokens, and rates by kind of question."""
    row, right, kept = adapted(study, policies)
    kinds = rates_by_kind(right, study.samples.kinds, kept)
    return {**row, "full": record(paired(right, study.right[FULL])), "kinds": kinds}


@torch.inference_mode()
def generated(model: Any, samples: Samples, vision: VisionPruning, decoded: Any) -> np.ndarray:
    """``(n,)`` bool: is the answer right that ``generate`` writes? What teacher forcing is held against.

    ``decoded`` turns ids into text.
    """
    import asymvlm
    from bench.quality.scorers import model_inputs

    right = []
    with asymvlm.patch(model, vision=vision):
        for row, turn in enumerate(samples.turns):
            inputs = model_inputs(samples, [row], answers=False)
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            right.append(decoded(output[0, inputs["input_ids"].shape[1] :]).strip() == turn.answer)
    return np.array(right)


__all__ = ["AVERAGES", "BUDGETS", "RATIOS", "KeptStudy", "beside_uniform", "budgets", "generated", "methods"]
