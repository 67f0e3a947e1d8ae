"""What pruning between layers leaves on the cache: which columns of the prompt the later layers hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.hf.pruned_cache import held
from asymvlm.inside.rotary import RotaryTable


@dataclass(frozen=True, eq=False)
class InsideState:
    """Of a prompt of S columns. A stage is the layers from one dropping of tokens to the next."""

    original_length: int  # S
    real: Mapping[int, torch.Tensor]  # first layer of each stage -> (B, S') bool: columns that are seen
    columns: Mapping[int, torch.Tensor]  # first layer of each stage -> (B, S') int64: columns it holds, -1 = padding
    lengths: torch.Tensor  # (B,) tokens of the prompt
    given: dict[str, Any] = field(default_factory=dict)  # the mask that the step in hand was called with
    rotary: RotaryTable | None = None  # where later layers number their tokens from 0

    def rows(self, index: torch.Tensor) -> InsideState:
        """Of the rows ``index`` ``(rows,)``, in that order."""
        real = {layer: rows[index.to(rows.device)] for layer, rows in self.real.items()}
        columns = {layer: rows[index.to(rows.device)] for layer, rows in self.columns.items()}
        lengths = self.lengths[index.to(self.lengths.device)]
        rotary = None if self.rotary is None else self.rotary.rows(index)
        return InsideState(self.original_length, real, columns, lengths, rotary=rotary)

    @property
    def length(self) -> int:
        """Columns of the prompt in the first layers, which tell the length of a cache."""
        return self.original_length

    @property
    def is_uneven(self) -> bool:
        """Whether layers hold different numbers of columns."""
        return any(real.shape[1] != self.original_length for real in self.real.values())

    @property
    def index(self) -> torch.Tensor:
        """With one entry a row, for whoever counts them."""
        return self.lengths

    def stage(self, layer: int) -> int | None:
        """The first layer of a layer's stage; None for the layers that hold all of the prompt."""
        return max((first for first in self.real if first <= layer), default=None)

    def standing(self, stage: int, new: int) -> torch.Tensor:
        """``(B, S' + new)``: columns that a stage holds with ``new`` behind the prompt; -1 for those not seen."""
        columns = self.columns[stage].masked_fill(~self.real[stage], -1)
        behind = torch.arange(self.original_length, self.original_length + new, device=columns.device)
        return torch.cat([columns, behind.expand(len(columns), -1)], 1)

    def dropped(self, stage: int) -> torch.Tensor:
        """``(B, 1)``: tokens that a stage lacks."""
        return (self.lengths - self.real[stage].sum(1))[:, None]


def inside_state(cache: Any) -> InsideState | None:
    """The state of a cache whose prompt was pruned between layers; None of any other."""
    state = held(cache)
    return state if isinstance(state, InsideState) else None
