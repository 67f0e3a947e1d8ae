"""What is pruned, and how: plain settings, checked when they are made."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from asymvlm.user_turns import UserTurns
from asymvlm_kernels import Budget, UniformBudget

POSITIONS = ("keep", "compact")


@dataclass(frozen=True, eq=False)
class VisionPruning:
    """Remove vision tokens before prefill.

    Args:
        scorer: the learned weight, ``(D,)`` fp32; None means ones, which is cosine similarity.
        budget: keep ratio of each sample. ``UniformBudget(1.0)`` leaves the model alone, bit for bit.
        text: which tokens vision is scored against: ``"all"`` real tokens that are not vision; ``"user"``, the words of
            the user's turns, without special and template tokens, which `UserTurns` finds; or a ``(B, S)`` bool mask
            for calls of exactly that shape.
        processor: for ``text="user"``, the processor or tokenizer that makes the prompts. Not kept.
        positions: ``"keep"`` leaves survivors at their original positions, so that pruning equals masking;
            ``"compact"`` renumbers them from 0 (one-dimensional, as paged engines do).
        per_image: rank every image of a sample by itself instead of all together.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    scorer: torch.Tensor | None = None
    budget: Budget = field(default_factory=lambda: UniformBudget(0.5))
    text: str | UserTurns | torch.Tensor = "all"
    positions: str = "keep"
    per_image: bool = False
    processor: InitVar[Any] = None

    def __post_init__(self, processor: Any) -> None:
        if self.scorer is not None and (
            not isinstance(self.scorer, torch.Tensor) or self.scorer.ndim != 1 or self.scorer.dtype != torch.float32
        ):
            found = (
                f"{tuple(self.scorer.shape)} {self.scorer.dtype}"
                if isinstance(self.scorer, torch.Tensor)
                else repr(self.scorer)
            )
            raise ValueError(f"scorer must be None or a (D,) float32 tensor, got {found}")
        if not isinstance(self.budget, Budget):
            raise ValueError(f"budget must be one like UniformBudget(0.5), got {self.budget!r}")
        if isinstance(self.text, torch.Tensor):
            if self.text.ndim != 2 or self.text.dtype != torch.bool:
                raise ValueError(f"text must be a (B, S) bool mask, got {tuple(self.text.shape)} {self.text.dtype}")
        elif self.text == "user":
            if processor is None:
                raise ValueError(
                    "text='user' needs processor=..., whose chat template tells the user's turns, got None"
                )
            object.__setattr__(self, "text", UserTurns.of(processor))
        elif self.text != "all" and not isinstance(self.text, UserTurns):
            raise ValueError(f"text must be 'all', 'user', UserTurns or a (B, S) bool mask, got {self.text!r}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be 'keep' or 'compact', got {self.positions!r}")

    @property
    def bypassed(self) -> bool:
        """True when nothing can be dropped, so the model is called untouched."""
        return isinstance(self.budget, UniformBudget) and self.budget.ratio == 1
