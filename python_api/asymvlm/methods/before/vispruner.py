"""VisPruner: half of the tokens are those that the vision tower attends to, the rest are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates, first_of
from asymvlm_kernels import cosine_matrix, drop_similar


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

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among = Candidates.of(prompt)
        return best_and_diverse(among, among.numbers(prompt.tower_attention), prompt.features, counts, self.important)


def best_and_diverse(
    among: Candidates, scores: torch.Tensor, features: torch.Tensor, counts: torch.Tensor, share: float
) -> Kept:
    """A share of the best by ``scores`` ``(B, N)``, then of the rest those unlike each other by ``features``."""
    best = (counts.long() * round(share * 1_000_000)) // 1_000_000
    order = among.ranked(scores)
    first = first_of(order, best)
    rest = order.masked_fill(first.gather(1, order) | ~among.mask.gather(1, order), -1)
    left = drop_similar(cosine_matrix(among.rows(features), among.mask), rest, counts - best)
    return Kept(among.marked(first | left))


def check_share(name: str, value: float) -> None:
    """Raise a ValueError for what is no share of a whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], got {value!r}")
