"""The recommended settings on pages like those they were calibrated on, and on two kinds that they were not.

`Spread` and a few background tokens with a relative threshold calibrated for an average, against half of the tokens,
each with and without the floor of tokens that look relevant (``at_least_relevant``), and the same without background.
Dense pages hold more entries than any the model was trained on; pages full of distractors have symbols that mean
nothing in nearly every free slot. Budgets are fitted on calibration pages in distribution only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from asymvlm import PruningReport, VisionPruning
from asymvlm.calibration import Calibration, calibrate_budget
from asymvlm.report.crowded import crowded_rows
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.settings.scorer import Scorer
from asymvlm.settings.suitable import USUAL
from asymvlm_kernels import UniformBudget
from bench.quality.answers import answers, prepared, tower_runs_once
from bench.quality.beyond import SPREAD
from bench.quality.budgets import CALIBRATION, answered, batches
from bench.quality.statistics import paired, rate, rates_by_kind, record
from bench.tinyvlm.evaluate import Samples, make_samples
from bench.tinyvlm.model import NUM_VISION
from bench.tinyvlm.pages import Pages

PAGES: dict[str, dict[str, Any]] = {
    "in distribution": {},
    "dense, 14 to 18 entries": {"entries": (14, 18)},
    "distractors in 0.9 of the free slots": {"distractors": 0.9},
}
AVERAGES = (0.3, 0.25)
BACKGROUND, MINIMUM = 4, 0.05  # tokens, and share of the others: chosen on validation pages
LADDER = (0.15, 0.35, 0.6)
FULL, FLOOR = "all tokens", ", at least the relevant"


def settings(
    model: Any, scorers: Sequence[Scorer], *, samples: int = CALIBRATION, cache: Path | None = None
) -> tuple[dict[str, list[VisionPruning]], dict[str, Any]]:
    """Every setting by name, one for each scorer, and what the calibrations found."""
    calibration = batches(make_samples("calibration", samples))
    found: dict[str, list[VisionPruning]] = {
        FULL: [VisionPruning(budget=UniformBudget(1.0))],
        "cosine, uniform 0.5": [VisionPruning(budget=UniformBudget(0.5))],
        "uniform 0.5": [VisionPruning(scorer, UniformBudget(0.5)) for scorer in scorers],
    }
    told: dict[str, Any] = {}
    for average in AVERAGES:
        for background in (0, BACKGROUND) if average == AVERAGES[-1] else (BACKGROUND,):
            fitted = [
                _fitted(
                    model, scorer, calibration, average, background, cache and cache / f"safety-{number}-{background}"
                )
                for number, scorer in enumerate(scorers)
            ]
            name = f"spread, {f'background {background}, ' if background else ''}relative {average:g}"
            for ending, floor in (("", False), (FLOOR, True))[: 2 if background else 1]:
                found[name + ending] = [
                    VisionPruning(one.scorer, spread=SPREAD, at_least_relevant=floor, background=background)
                    for one in fitted
                ]
            told[name] = [
                {
                    "budget": budget_to_dict(one.budget),
                    "kept": round(one.average, 4),
                    USUAL: one.scorer.calibration[USUAL],
                }
                for one in fitted
            ]
    return found, told


def _fitted(
    model: Any,
    scorer: Scorer,
    samples: Sequence[Mapping[str, Any]],
    average: float,
    background: int,
    checkpoint: Path | None,
) -> Calibration:
    """The relative threshold for an average; where no background stays, more of the best is the least it may keep."""
    return calibrate_budget(
        model,
        scorer,
        samples,
        answered,
        average,
        "relative",
        minimum=MINIMUM if background else 0.1,
        maximum=1.0,
        ratios=LADDER,
        spread=SPREAD,
        background=background,
        checkpoint=checkpoint,
        progress=False,
    )


def measure(
    model: Any, samples: Samples, chosen: Mapping[str, Sequence[VisionPruning]], cache: Path | None = None
) -> dict[str, Any]:
    """Rates of every setting, what it keeps, by kind of question, and paired differences.

    ``cache`` keeps the answers under each setting, so that an interrupted run goes on.
    """
    samples = by_kind(samples)
    ready, found = prepared(samples), {}
    with tower_runs_once(model):
        for name, runs in chosen.items():
            found[name] = _asked(model, samples, ready, runs, cache and cache / f"{name}.npz")
    rows = {}
    for name, asked in found.items():
        right, kept = asked["right"], asked["kept"] / NUM_VISION
        rows[name] = {
            "kept": round(float(kept.mean()), 4),
            **record(rate(right)),
            "runs": [round(float(run.mean()), 4) for run in right],
            "warned": round(float(asked["warned"].mean()), 4),
            "kinds": rates_by_kind(right, samples.kinds, kept),
            "full": record(paired(right, found[FULL]["right"])),
        }
        if name.endswith(FLOOR):
            rows[name]["floor"] = record(paired(right, found[name.removesuffix(FLOOR)]["right"]))
    return rows


def by_kind(samples: Samples) -> Samples:
    """The same by kind of question and number of entries: rows that keep about as many tokens share a batch."""
    keys = [(turn.kind, len(layout.slots)) for turn, layout in zip(samples.turns, samples.pages.layouts, strict=True)]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    pages = samples.pages
    return Samples(
        Pages([pages.layouts[i] for i in order], pages.pixels[order], pages.glyph[order], pages.owner[order]),
        [samples.turns[i] for i in order],
        *(tensor[order] for tensor in (samples.text, samples.labels, samples.question)),
    )


def _asked(
    model: Any,
    samples: Samples,
    ready: Sequence[dict[str, Any]],
    runs: Sequence[VisionPruning],
    file: Path | None,
) -> Mapping[str, np.ndarray]:
    """Of each run and sample: is the answer right, how many tokens stayed, does the report warn of it?"""
    if file is None or not file.is_file():
        asked = [answers(model, samples, run, batches=ready) for run in runs]
        table = {
            "right": np.stack([found.right.numpy() for found in asked]),
            "kept": np.stack([found.counts.numpy() for found in asked]),
            "warned": np.stack([_warned(found.reports) for found in asked]),
        }
        if file is None:
            return table
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, right=table["right"], kept=table["kept"], warned=table["warned"])
    return dict(np.load(file))


def safety(
    model: Any, scorers: Sequence[Scorer], samples: int, seed: int, *, cache: Path | None = None
) -> dict[str, Any]:
    """Every setting on every kind of pages."""
    with tower_runs_once(model):
        chosen, told = settings(model, scorers, cache=cache)
    return {
        "spread": asdict(SPREAD),
        "background": BACKGROUND,
        "calibration_samples": CALIBRATION,
        "calibrated": told,
        "pages": {
            name: measure(
                model, make_samples("test", samples, seed=seed, **how), chosen, cache and cache / f"{name}, {samples}"
            )
            for name, how in PAGES.items()
        },
    }


def _warned(reports: Sequence[PruningReport]) -> np.ndarray:
    """Row by row."""
    rows: list[bool] = []
    for report in reports:
        crowded = crowded_rows(report)
        rows += [row in crowded for row in range(len(report.kept))]
    return np.array(rows)


__all__ = ["AVERAGES", "FLOOR", "FULL", "PAGES", "measure", "safety", "settings"]
