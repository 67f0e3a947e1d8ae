"""Every method of vision pruning at equal kept tokens: what it costs in answers, in work, in bytes and in time.

A method before the decoder keeps its share in all layers. A method between layers keeps all tokens in the first ones,
so it gets the schedule that holds the same share on average over the layers; where its first layers alone hold more,
there is none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import asymvlm
from asymvlm import VisionPruning
from asymvlm.methods import AsymVLM, BeforeMethod, InsideMethod
from asymvlm.methods.registry import OURS
from asymvlm_kernels import UniformBudget
from bench.quality.scorers import model_inputs
from bench.quality.study import CONTROLS, FULL, RATIOS, Study, key
from bench.tinyvlm.evaluate import ROWS, Samples

CONTROL = "downsample"
OTHERS: dict[str, type[Any]] = {  # beside the study's own
    kind.name: kind
    for kind in OURS
    if issubclass(kind, BeforeMethod) and kind is not AsymVLM and kind.name not in CONTROLS
}
# one that hides tokens holds them all, whatever its schedule
INSIDE: dict[str, type[Any]] = {kind.name: kind for kind in OURS if issubclass(kind, InsideMethod) and not kind.hides}
ROUNDS = 5  # of timing; the median counts


def settings(study: Study, name: str, ratio: float) -> list[VisionPruning] | None:
    """The runs of a method that hold ``ratio`` of the vision tokens on average over layers; None where none does."""
    if name in INSIDE:
        try:
            own = INSIDE[name].for_average(ratio, study.model.config.text_config.num_hidden_layers)
        except ValueError:
            return None
        return [VisionPruning(method=own)]
    runs = [OTHERS[name]()] if name in OTHERS else study.runs(name)
    return [VisionPruning(method=run, budget=UniformBudget(ratio)) for run in runs]


def compared(
    study: Study, ours: str, ratios: Sequence[float] = RATIOS, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Tables 2 and 4 in shape: answers of every method at every ratio, by kind of question.

    Args:
        ours: the method of the study that the others are compared with, sample by sample.
        names: the methods, by default all.
    """
    names = all_names(study) if names is None else names
    rates: dict[str, Any] = {name: {} for name in names}
    for name in names:
        for ratio in ratios:
            runs = settings(study, name, ratio)
            if runs is None:
                continue
            if key(name, ratio) not in study.right:
                study.measure(key(name, ratio), runs)
            rates[name][f"{ratio:g}"] = study.summary(key(name, ratio))
    return {
        "full": study.summary(FULL),
        "ours": ours,
        "rates": rates,
        "paired": [
            study.compare(key(name, ratio), key(other, ratio))
            for other in (ours, CONTROL)
            for name in names
            if name != other
            for ratio in ratios
            if key(name, ratio) in study.right
        ],
    }


def all_names(study: Study) -> list[str]:
    """Of the study's own methods, and of all others."""
    return [*study.methods, *OTHERS, *INSIDE]


def costs(study: Study, ratios: Sequence[float] = RATIOS) -> dict[str, Any]:
    """What every method costs at every ratio, and the unpruned model."""
    found: dict[str, Any] = {FULL: {"1": cost(study.model, study.samples, VisionPruning(budget=UniformBudget(1.0)))}}
    for name in all_names(study):
        runs = {ratio: settings(study, name, ratio) for ratio in ratios}
        found[name] = {f"{ratio:g}": cost(study.model, study.samples, run[0]) for ratio, run in runs.items() if run}
    return {"costs": found, "rounds": ROUNDS}


@torch.inference_mode()
def cost(model: Any, samples: Samples, vision: VisionPruning) -> dict[str, float]:
    """Of the prompts of one batch: prefill FLOPs by the paper's formula and K/V bytes measured, both as shares of the
    unpruned model's, and the median time to the first token in ms.
    """
    lengths = samples.question.sum(1)
    rows = (lengths == lengths.mode().values).nonzero()[:ROWS, 0]  # questions of one length need no padding
    inputs, times = model_inputs(samples, rows.tolist(), answers=False), []
    with asymvlm.patch(model, vision=vision) as handle:
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            times.append(time.perf_counter() - begun)
        report = handle.last
    assert report is not None
    flops, kv = sum(report.flops_after) / sum(report.flops_before), 1.0
    if report.kv_bytes is not None and report.kv_bytes_before:
        kv = report.kv_bytes / report.kv_bytes_before
    return {
        "rows": len(rows),
        "kept": round(sum(report.kept) / sum(report.vision_tokens), 4),
        "flops": round(flops, 4),
        "kv": round(kv, 4),
        "ms": round(1000 * statistics.median(times), 2),
    }


__all__ = ["INSIDE", "OTHERS", "RATIOS", "all_names", "compared", "costs", "settings"]
