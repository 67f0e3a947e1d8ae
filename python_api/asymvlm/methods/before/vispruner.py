"""VisPruner: half of the tokens are those that the vision tower attends to, the rest are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates, first_of
from asymvlm_kernels import cosine_matrix, drop_similar
from asymvlm_kernels.millionths import part_of


@dataclass(frozen=True)
class VisPruner(SelectingMethod):
    """The tokens with the most attention of the tower; of the rest, by rounds, those unlike any other.

    In a round the rest stands in the order of attention; of the tokens at even places, the up to 8 that resemble a
    token at an odd place most, by the cosine of tower features, go.

    Args:
        important: share of the budget that goes by attention alone, in [0, 1]; rounded down.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "arXiv:2412.01818"
    needs_tower: ClassVar[bool] = True
    needs_tower_attention: ClassVar[bool] = True

    important: float = 0.5

    def __post_init__(self) -> None:
        check_share("important", self.important)

    def importance(self, prompt: VisionPrompt, among: Candidates) -> torch.Tensor:
        """``(B, N)`` fp32: by which the first share of the budget is chosen, and the rest ranked."""
        return among.numbers(prompt.tower_attention)

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among, best = Candidates.of(prompt), part_of(counts.long(), self.important)
        order = among.ranked(self.importance(prompt, among))
        first = first_of(order, best)
        rest = order.masked_fill(first.gather(1, order) | ~among.mask.gather(1, order), -1)
        left = drop_similar(cosine_matrix(among.rows(prompt.features), among.mask), rest, counts - best)
        return Kept(among.marked(first | left))


def check_share(name: str, value: float) -> None:
    """Raise a ValueError for what is no share of a whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {value!r}")
