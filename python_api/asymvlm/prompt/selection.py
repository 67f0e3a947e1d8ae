"""Which tokens of a prompt were kept, by which scores: what a report is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm.models.adapter import Grid


@dataclass(frozen=True, eq=False)
class Selection:
    """Of one pruned prompt: B rows, S columns before and S' after. Tensors stay on the model's device."""

    lengths_before: torch.Tensor  # (B,) real tokens
    lengths_after: torch.Tensor  # (B,)
    num_vision: torch.Tensor  # (B,) prunable vision tokens, N
    counts: torch.Tensor  # (B,) kept ones, K
    gaps: torch.Tensor  # (B,) fp32
    scores: torch.Tensor  # (B, S) fp32, -inf outside the prunable vision tokens
    own: torch.Tensor  # (B, S) fp32, the scores before they spread
    index: torch.Tensor  # (B, S') int64, original place of each kept token, -1 = padding
    has_text: torch.Tensor  # (B,) bool: there was text to score against
    columns_before: int  # S, padding included
    image_grids: list[list[Grid]] | None  # of each row's images: rows and columns of vision tokens
