"""What training does, as plain values: checked when made, stored with the scorer, compared on resume."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from asymvlm.hf.key_bias import INJECTIONS

LOWEST, HIGHEST = 0.0, 3.0  # w is clamped to these after every step
MASKED_ROWS = ("text", "all")
CLAMPED_SHARE = 0.2  # a larger share of widths on a clamp is worth a warning


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings of `train_scorer`; the defaults are what measured better, `paper` is the paper's appendix D.

    Args:
        keep_ratio: ratio that ``theta`` stands for; of several, each step draws one.
        strength: C, the largest penalty in attention logits.
        temperature: tau, in units of scores.
        theta_grad: let the gradient flow through ``theta`` too; the paper detaches it.
        learning_rate: of AdamW, weight decay 0.
        batch_size: samples a step, over all ranks and accumulated pieces.
        epochs: passes over the samples. The default was measured on 1500 samples, 188 steps; few samples need more.
        regularization: lambda of ``lambda * ||w - 1||^2``.
        seed: of the order of samples and of drawn ratios. The same seed gives the same weight.
        injection: ``"mask"`` (additive 4-D masks), ``"bias"`` (key-bias attention, where the model's mask allows), or
            ``"auto"``: the kernel on CUDA, masks on a CPU.
        masked_rows: rows of the pass under the soft mask. ``"all"``: the whole sequence, as the paper says. ``"text"``:
            text tokens alone, beside the keys and values that vision tokens have in the pass without it: cheaper,
            and an approximation, since vision tokens do not see the soft mask.
        gradient_checkpointing: keep the inputs of decoder layers only, and run each again in the backward pass. A pass
            of text rows has little to keep and runs once.
        patience: stop after this many evaluations without improvement; None never stops early. An evaluation is the
            mean loss of the validation samples, or of the epoch's steps where there are none.
    """

    keep_ratio: float | tuple[float, ...] = 0.5
    strength: float = 5.0
    temperature: float = 0.1
    theta_grad: bool = True
    learning_rate: float = 3e-2
    batch_size: int = 8
    epochs: int = 1
    regularization: float = 1e-3
    seed: int = 0
    injection: str = "auto"
    masked_rows: str = "all"
    gradient_checkpointing: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, list):
            object.__setattr__(self, "keep_ratio", tuple(self.keep_ratio))
        if not self.ratios or not all(isinstance(r, (int, float)) and 0 < r < 1 for r in self.ratios):
            raise ValueError(f"keep_ratio must be one ratio in (0, 1) or several, got {self.keep_ratio!r}")
        for name in ("strength", "temperature", "learning_rate"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not (isinstance(self.regularization, (int, float)) and 0 <= self.regularization < math.inf):
            raise ValueError(f"regularization must be 0 or more, got {self.regularization!r}")
        for name in ("batch_size", "epochs", "patience"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "patience" and value is None):
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.injection not in ("auto", *INJECTIONS):
            raise ValueError(f"injection must be 'auto', {' or '.join(map(repr, INJECTIONS))}, got {self.injection!r}")
        if self.masked_rows not in MASKED_ROWS:
            raise ValueError(f"masked_rows must be {' or '.join(map(repr, MASKED_ROWS))}, got {self.masked_rows!r}")

    @property
    def ratios(self) -> tuple[float, ...]:
        return self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,)

    @classmethod
    def paper(cls, **changes: Any) -> TrainingSettings:
        """Appendix D: C = 5, tau = 1, theta detached, learning rate 1e-3, batch 1, 3 epochs, lambda 1e-3.

        The paper does not name its ratio; 0.5 is used here.
        """
        settings: dict[str, Any] = {
            "strength": 5.0,
            "temperature": 1.0,
            "theta_grad": False,
            "learning_rate": 1e-3,
            "batch_size": 1,
            "epochs": 3,
            "regularization": 1e-3,
        }
        return cls(**{**settings, **changes})

    @classmethod
    def named(cls, name: str, **changes: Any) -> TrainingSettings:
        """``"default"`` or ``"paper"``, with changes."""
        if name not in PRESETS:
            raise ValueError(f"settings must be {' or '.join(map(repr, PRESETS))}, got {name!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(changes.keys() - set(known)):
            raise TypeError(f"unknown setting {unknown[0]!r}, wanted one of {', '.join(known)}")
        return cls.paper(**changes) if name == "paper" else cls(**changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"keep_ratio": list(self.ratios)}


PRESETS = ("default", "paper")

__all__ = ["TrainingSettings"]
