"""Budgets that adapt to the sample against a uniform one at the same measured average: Table 5 in shape.

A budget is fitted by `asymvlm.calibration.calibrate_budget` on pages of the ``calibration`` split and judged on test
pages. There its average may differ a little from the wanted one, so the uniform budget it is compared with keeps
exactly as many tokens over all test samples: rows get the next lower or the next higher count, spread evenly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asymvlm import VisionPruning
from asymvlm.calibration import calibrate_budget
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import UniformBudget
from bench.quality.answers import answers
from bench.quality.scorers import model_inputs
from bench.quality.statistics import paired, rate, record
from bench.quality.study import Study, key
from bench.tinyvlm.evaluate import ROWS, Samples, make_samples
from bench.tinyvlm.model import NUM_VISION

METHODS = {"threshold": "Method A", "linear": "Method B", "relative": "relative threshold"}
AVERAGES = (0.5, 0.33, 0.22)  # at 0.11 nothing is above the lowest ratio
CONTROLS = ("random", "stride", "downsample")
LADDER = (0.1, 0.15, 0.22, 0.28, 0.33, 0.4, 0.5, 0.65, 0.8)
CALIBRATION = 500  # samples, as many as the paper takes


def batches(samples: Samples) -> list[dict[str, torch.Tensor]]:
    """Model inputs with labels, without padding: samples of one length share a batch."""
    length = (samples.question | (samples.labels >= 0)).sum(1).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for row, columns in enumerate(length):
        groups[columns].append(row)
    return [
        model_inputs(samples, rows[start : start + ROWS])
        for _, rows in sorted(groups.items())
        for start in range(0, len(rows), ROWS)
    ]


def answered(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[float]:
    """1 for each row whose answer is right, by teacher forcing; the text is what follows the vision tokens."""
    labels = inputs["labels"][:, 1 + NUM_VISION :]
    predicted = model(**inputs).logits[:, -labels.shape[1] - 1 : -1].argmax(-1)
    right: list[float] = ((predicted == labels) | (labels < 0)).all(1).double().tolist()
    return right


def even_counts(total: int, rows: int) -> torch.Tensor:
    """``(rows,)`` whole numbers that add up to ``total``, no two further apart than 1, the larger ones spread out."""
    place = torch.arange(rows + 1, dtype=torch.int64) * total // rows
    return place.diff()


def adaptive(
    study: Study,
    scorers: Sequence[Scorer],
    averages: Sequence[float] = AVERAGES,
    *,
    samples: int = CALIBRATION,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every method at every average, for each scorer; ``cache`` keeps the measurements of the calibration."""
    calibration = batches(make_samples("calibration", samples))
    result: dict[str, Any] = {"calibration_samples": samples, "averages": {}, "controls": {}}
    for average in averages:
        rows: dict[str, Any] = {}
        for method, name in METHODS.items():
            chosen = [
                calibrate_budget(
                    study.model,
                    scorer,
                    calibration,
                    answered,
                    average,
                    method,
                    minimum=0.1,
                    maximum=1.0,
                    ratios=(*LADDER, average) if average not in LADDER else LADDER,
                    checkpoint=None if cache is None else cache / f"scorer-{number}",
                    progress=progress,
                )
                for number, scorer in enumerate(scorers)
            ]
            pairs = zip(scorers, chosen, strict=True)
            row, _, _ = adapted(study, [VisionPruning(scorer, one.budget) for scorer, one in pairs])
            rows[name] = {
                **row,
                "budgets": [budget_to_dict(calibrated.budget) for calibrated in chosen],
                "calibrated": [
                    {"kept": round(one.average, 4), "difference": round(one.difference, 4)} for one in chosen
                ],
            }
        result["averages"][f"{average:g}"] = rows
        for name in CONTROLS:
            study.uniform(name, average)
            result["controls"].setdefault(name, {})[f"{average:g}"] = study.summary(key(name, average))
    return result


def adapted(study: Study, policies: Sequence[VisionPruning]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """A record of the answers under policies that adapt, beside the same scores and as many tokens spread evenly over
    the samples; and of each policy and sample, ``(runs, n)``: is the answer right, and which share stayed?
    """
    ours, even, counts = [], [], []
    for policy in policies:
        found = answers(study.model, study.samples, policy)
        equal = even_counts(int(found.counts.sum()), len(study.samples))
        counts.append(found.counts.numpy())
        ours.append(found.right.numpy())
        even.append(answers(study.model, study.samples, policy, counts=equal).right.numpy())
    right, uniform, kept = np.stack(ours), np.stack(even), np.stack(counts) / NUM_VISION
    row = {
        "kept": round(float(kept.mean()), 4),
        **record(rate(right)),
        "runs": [round(float(run.mean()), 4) for run in right],
        "uniform": record(rate(uniform)),
        "paired": record(paired(right, uniform)),
    }
    return row, right, kept


def gaps(study: Study, weight: torch.Tensor | None) -> list[float]:
    """Importance gaps of the samples, for the histogram; None means cosine similarity."""
    found = answers(study.model, study.samples, VisionPruning(weight, UniformBudget(0.5)))
    return [round(value, 4) for value in found.gaps.tolist()]


__all__ = ["AVERAGES", "METHODS", "adaptive", "answered", "batches", "even_counts", "gaps"]
