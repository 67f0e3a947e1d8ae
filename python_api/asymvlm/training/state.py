"""A training run on disk, so that an interrupted one goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FILE = "training_state.safetensors"
TENSORS = ("weight", "exp_avg", "exp_avg_sq", "best_weight")


@dataclass
class TrainingState:
    """Everything the next step depends on. Tensors are ``(D,)`` fp32; the order of samples follows from the seed."""

    weight: torch.Tensor
    exp_avg: torch.Tensor  # AdamW's moments
    exp_avg_sq: torch.Tensor
    best_weight: torch.Tensor
    step: int = 0
    best_loss: float = float("inf")
    bad_evaluations: int = 0
    stopped: bool = False
    epoch_loss: float = 0.0  # sum over the steps of the running epoch
    losses: list[float] = field(default_factory=list)  # of each step
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def fresh(cls, weight: torch.Tensor) -> TrainingState:
        return cls(weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight), weight.clone())

    def to(self, device: torch.device | str) -> TrainingState:
        """The same with its tensors on ``device``."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def save(self, folder: Path, run: dict[str, Any]) -> None:
        """Write it, replacing an older one at once. ``run`` says which run it belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {name: value for name, value in vars(self).items() if name not in TENSORS}
        metadata = {"run": json.dumps(run, sort_keys=True), "numbers": json.dumps(numbers)}
        part = folder / f"{FILE}.part"
        save_file({name: getattr(self, name).detach().cpu() for name in TENSORS}, part, metadata)
        os.replace(part, folder / FILE)

    @classmethod
    def load(cls, folder: Path, run: dict[str, Any]) -> TrainingState | None:
        """The state in ``folder``, on the CPU; None where there is none.

        Raises:
            ValueError: if it is the state of another run.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in TENSORS}
            found, numbers = json.loads(metadata["run"]), json.loads(metadata["numbers"])
            state = cls(**tensors, **numbers)
            if not isinstance(found, dict):
                raise TypeError(f"the run is a {type(found).__name__}")
        except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no state of a run ({error}): resume=False starts over") from error
        wanted = json.loads(json.dumps(run))
        if found != wanted:
            name = next(key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key))
            raise ValueError(
                f"{file} is the state of another run: {name} {found.get(name)!r} found, {wanted.get(name)!r} wanted; "
                "resume=False starts over"
            )
        return state
