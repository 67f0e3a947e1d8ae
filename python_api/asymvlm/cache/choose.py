"""The lowest scored tokens of each row, in a total order: no result depends on where in the cache a token lies."""

from __future__ import annotations

import torch


def lowest(
    scores: torch.Tensor, candidates: torch.Tensor, columns: torch.Tensor, count: torch.Tensor | int
) -> torch.Tensor:
    """Choose ``count`` candidates of each row to evict: the lowest scores, among equal ones the oldest.

    Args:
        scores: ``(B, S)`` fp32. NaN ranks below every number, -0 equals +0.
        candidates: ``(B, S)`` bool. Nothing else is ever chosen, even where a row has fewer than ``count``.
        columns: ``(B, S)`` integers: the age of each token, lower is older.
        count: ``(B,)`` integers, or one number.
    Returns:
        ``(B, S)`` bool. Exact on every device; does not synchronise.
    """
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0 a +0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # orders as the floats do
    ordered = ordered.masked_fill(scores.isnan(), -(2**31))
    key = (ordered << 32) + columns.long() + 2  # columns are -2 or more
    key = key.masked_fill(~candidates, torch.iinfo(torch.int64).max)
    order = key.argsort(dim=1, stable=True)
    place = torch.arange(key.shape[1], device=key.device)
    limit = count[:, None] if isinstance(count, torch.Tensor) else count
    chosen = torch.zeros_like(candidates).scatter_(1, order, (place < limit).expand_as(candidates))
    return chosen & candidates
