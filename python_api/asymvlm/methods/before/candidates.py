"""The tokens that a method chooses among, side by side, and the way back to the columns of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm.methods.before.base import VisionPrompt
from asymvlm_kernels import gather_rows
from asymvlm_kernels.prefill.reference import compact
from asymvlm_kernels.ranking import order_key


@dataclass(frozen=True, eq=False)
class Candidates:
    """The prunable tokens of each row, N of the row that has the most.

    Attributes:
        index: ``(B, N)`` int64, their columns, ascending; -1 behind them.
        columns: S, of the prompt.
    """

    index: torch.Tensor
    columns: int

    @classmethod
    def of(cls, prompt: VisionPrompt) -> Candidates:
        """Reads the largest N on the host."""
        prunable = prompt.tokens.prunable
        most = int(prunable.sum(1).max()) if prunable.numel() else 0
        return cls(compact(prunable, most), prunable.shape[1])

    @property
    def mask(self) -> torch.Tensor:
        """``(B, N)`` bool: where there is one."""
        return self.index >= 0

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(B, S, D)`` to ``(B, N, D)``, fp32 where it was float64; zero rows behind."""
        return gather_rows(tensor.float() if tensor.dtype == torch.float64 else tensor, self.index)

    def numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(B, S)`` to ``(B, N)``."""
        return gather_rows(tensor[..., None], self.index)[..., 0]

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 to ``(B, N)`` int64: the candidates, best first; of equal ones the first, NaN last."""
        return order_key(scores, self.mask).argsort(dim=-1, descending=True, stable=True)

    def marked(self, chosen: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` bool to ``(B, S)`` bool."""
        marks = torch.zeros(len(chosen), self.columns + 1, dtype=torch.bool, device=chosen.device)
        return marks.scatter(1, self.index.masked_fill(~self.mask, self.columns), chosen & self.mask)[:, :-1]


def first_of(order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``(B, N)`` bool: the ``counts`` ``(B,)`` first of an order ``(B, N)``."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, ranks < counts[:, None])
