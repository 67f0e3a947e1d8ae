"""What a call returns: rows of the shortened prompt back in the caller's columns, and the report of the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from asymvlm.prompt.shorten import PrunedPrompt


def with_original_columns(output: Any, prompt: PrunedPrompt, *, labelled: bool) -> Any:
    """What a forward returns, its logits spread over the columns that the call came with."""
    place = 1 if labelled else 0  # in a tuple the loss comes first
    logits = output[place] if isinstance(output, tuple) else output.logits
    index = prompt.state.index[:, -logits.shape[1] :]
    first = prompt.state.original_length - prompt.columns  # earlier turns are in the cache
    logits = spread_out(logits, torch.where(index >= 0, index - first, -1), prompt.columns)
    if isinstance(output, tuple):
        return (*output[:place], logits, *output[place + 1 :])
    output.logits = logits
    return output


def marked_columns(index: torch.Tensor, columns: int) -> torch.Tensor:
    """``(B, columns)`` bool: which columns an index ``(B, n)`` names; -1 names none."""
    marked = torch.zeros((len(index), columns + 1), dtype=torch.bool, device=index.device)
    return marked.scatter_(1, index.where(index >= 0, columns), True)[:, :columns]


def spread_out(rows: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """Each column gets the row of the nearest kept column that is not behind it; zeros where there is none.

    Args:
        rows: ``(B, S', ...)``, any dtype, differentiable.
        index: ``(B, S')`` int64, ascending: the column of each row, -1 for padding.
        columns: S.
    Returns:
        ``(B, S, ...)``.
    """
    kept = index >= 0
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    slot = torch.full((len(index), columns + 1), -1, dtype=torch.int64, device=index.device)
    slot = slot.scatter_(1, index.where(kept, columns), slots)[:, :columns].cummax(1).values
    wide = slot.reshape(*slot.shape, *[1] * (rows.ndim - 2))
    spread = rows.gather(1, wide.clamp_min(0).expand(-1, -1, *rows.shape[2:]))
    return spread.masked_fill(wide < 0, 0)
