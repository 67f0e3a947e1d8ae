"""One model, one set of test samples, and which answers every method gets right on exactly those."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asymvlm import VisionPruning
from asymvlm.methods import AsymVLM, BeforeMethod, Downsample, RandomTokens, Spiral, Stride
from asymvlm_kernels import UniformBudget
from bench.quality.answers import answers
from bench.quality.statistics import paired, rate, rates_by_kind, record
from bench.tinyvlm.evaluate import Samples

RATIOS = (0.75, 0.65, 0.5, 0.33, 0.22, 0.11)  # the paper's, and those that the field reports
FULL = "full"
CONTROLS = ("random", "stride", "downsample", "spiral")  # they see neither page nor question


@dataclass
class Study:
    """Right answers by method and budget, ``(runs, n)`` bool: a run is a seed of a scorer or of random choice.

    ``weights`` maps a learned method to the ``(D,)`` weight of each of its seeds.
    """

    model: Any
    samples: Samples
    weights: Mapping[str, Sequence[torch.Tensor]]
    seeds: int = 3  # of random choice
    right: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.measure(FULL, [VisionPruning(budget=UniformBudget(1.0))])

    @property
    def methods(self) -> tuple[str, ...]:
        return (*CONTROLS, "cosine", *self.weights)

    def runs(self, method: str) -> list[BeforeMethod]:
        """The library's method behind every run of ``method``."""
        if method in self.weights:
            return [AsymVLM(weight) for weight in self.weights[method]]
        if method == "random":
            return [RandomTokens(seed) for seed in range(self.seeds)]
        return [{"cosine": AsymVLM, "stride": Stride, "downsample": Downsample, "spiral": Spiral}[method]()]

    def measure(self, name: str, runs: Sequence[VisionPruning]) -> np.ndarray:
        """Right answers under ``name``, of a model that is patched with the settings of each run."""
        self.right[name] = np.stack([answers(self.model, self.samples, run).right.numpy() for run in runs])
        return self.right[name]

    def uniform(self, method: str, ratio: float) -> np.ndarray:
        """Right answers of a method at a keep ratio, measured once."""
        name = key(method, ratio)
        if name not in self.right:
            self.measure(name, [VisionPruning(method=run, budget=UniformBudget(ratio)) for run in self.runs(method)])
        return self.right[name]

    def summary(self, name: str) -> dict[str, Any]:
        """Rate over all samples, by kind of question, and of every run."""
        right = self.right[name]
        kinds = rates_by_kind(right, self.samples.kinds)
        return {**record(rate(right)), "runs": [round(float(run.mean()), 4) for run in right], "kinds": kinds}

    def compare(self, first: str, second: str) -> dict[str, Any]:
        return {"first": first, "second": second, **record(paired(self.right[first], self.right[second]))}


def key(method: str, ratio: float) -> str:
    """Name of a method at a uniform ratio."""
    return f"{method}/{ratio:g}"


def uniform(study: Study, ratios: Sequence[float] = RATIOS) -> dict[str, Any]:
    """Table 4 in shape: every method at every ratio, and the comparisons that a claim rests on."""
    for method in study.methods:
        for ratio in ratios:
            study.uniform(method, ratio)
    pairs = [("cosine", "spiral"), ("cosine", "random"), *((name, "cosine") for name in study.weights)]
    learned = list(study.weights)
    pairs += [(second, first) for first, second in itertools.pairwise(learned)]
    compared = [study.compare(key(one, ratio), key(two, ratio)) for one, two in pairs for ratio in ratios]
    compared += [study.compare(key(name, ratio), FULL) for name in learned for ratio in ratios]
    return {
        "full": study.summary(FULL),
        "rates": {
            method: {f"{ratio:g}": study.summary(key(method, ratio)) for ratio in ratios} for method in study.methods
        },
        "paired": compared,
    }


__all__ = ["CONTROLS", "FULL", "RATIOS", "Study", "key", "uniform"]
