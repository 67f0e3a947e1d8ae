"""What of a selection looks at the scores themselves: how they spread, and how many are kept at least.

As the ops of `prune_sequence` take it, and back. A budget that counts scores is told with the other budgets
(`budget_numbers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from asymvlm_kernels.budget import AtLeastRelevant
from asymvlm_kernels.millionths import MILLION
from asymvlm_kernels.prefill.prune.budget_numbers import RELATIVE, kind_of, number_bits
from asymvlm_kernels.prefill.relative import _relative_counts_reference
from asymvlm_kernels.prefill.spread import Spread

NO_FLOOR = -1  # in place of a usual share


class ScoreRule(NamedTuple):
    """The last arguments of `score_select` and `prune_static`."""

    lines: torch.Tensor | None = None  # (B, S) int64 or int32; None: no score spreads
    reach: int = 0
    share: float = 1.0
    floor: Sequence[float] = ()  # beta and usual share of `AtLeastRelevant`, or none

    @classmethod
    def of(cls, spread: Spread | None, lines: torch.Tensor | None, floor: AtLeastRelevant | None) -> ScoreRule:
        bounds = [] if floor is None else [float(floor.beta), float(floor.usual)]
        if spread is None or lines is None:
            return cls(floor=bounds)
        return cls(lines, spread.reach, float(spread.share), bounds)

    def told(self) -> tuple[Any, ...]:
        """The arguments of the op: none where there is nothing to tell."""
        return tuple(self) if self.is_given else ()

    @property
    def is_given(self) -> bool:
        return self.lines is not None or len(self.floor) > 0

    def ranks_by_scores(self, ratios: Sequence[int]) -> bool:
        """Whether scores decide, with a budget that `encode_budget` wrote down as ``ratios``: another build."""
        return self.is_given or kind_of(ratios) == RELATIVE

    @property
    def line_strides(self) -> tuple[int, int]:
        return (0, 0) if self.lines is None else (self.lines.stride(0), self.lines.stride(1))

    @property
    def numbers(self) -> list[Any]:
        """What a kernel takes beside pointers: reach, both weights, the floor's beta as bits and its share."""
        beta, usual = self.floor or (0.0, 0.0)
        (bits, *_) = number_bits([beta], rounded=False)
        return [self.reach, float(1 - self.share), self.share, bits, round(usual * MILLION) if self.floor else NO_FLOOR]

    @property
    def spreading(self) -> tuple[Spread, torch.Tensor] | None:
        return None if self.lines is None else (Spread(self.reach, self.share), self.lines)

    @property
    def plain_floor(self) -> AtLeastRelevant | None:
        """The floor, counted in plain PyTorch whatever the backend."""
        return _PlainFloor(*self.floor) if self.floor else None


class _PlainFloor(AtLeastRelevant):
    def relevant(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _relative_counts_reference(scores, mask, self.beta, 1, MILLION)
