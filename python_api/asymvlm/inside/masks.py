"""What the tokens of a layer may see where earlier layers hold more of the prompt."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.hf.flash import uses_flash
from asymvlm.hf.masks import attention_form, opened


def stage_mask(config: Any, hidden: torch.Tensor, mask: Any, index: torch.Tensor, real: torch.Tensor) -> Any:
    """The mask of a stage's layer while the prompt is prefilled, in the form of the decoder's attention.

    Args:
        hidden: ``(B, S', D)``. mask: what the layer would get for all S columns; windows in it go by these columns.
        index: ``(B, S')`` int64, columns that are left, -1 for padding. real: ``(B, S')`` bool, those that are seen.
    """
    if uses_flash(config):
        return None if bool(real.all()) else real
    chosen, real = index.clamp_min(0).to(hidden.device), real.to(hidden.device)
    rows, columns = chosen[:, None, :, None], chosen[:, None, None]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        found = opened(mask).expand(len(chosen), -1, -1, -1)
        across = rows.expand(-1, -1, -1, found.shape[-1])
        block = found.gather(2, across).gather(3, columns.expand(-1, -1, chosen.shape[1], -1))
    else:
        block = columns <= rows
    own = torch.eye(chosen.shape[1], dtype=torch.bool, device=hidden.device)  # a row that sees nothing would be NaN
    return attention_form(config, hidden, (block & real[:, None, None]) | own)


def open_behind(mask: Any, queries: int, new: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """``(B or 1, 1, Q, new)`` bool: what a step's tokens see of the ``new`` columns behind the prompt, theirs the last.

    Args:
        mask: that the model was called with, ``(B, columns)`` or None for ones. The decoder's own do not do: their
            width is that of the first layer of a kind, which may hold fewer columns.
    Raises:
        NotImplementedError: for a mask of another form.
    """
    seen = torch.ones((queries, new), dtype=torch.bool, device=like.device).tril(new - queries)[None, None]
    if mask is None:
        return seen
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape[1:]) != (columns,):
        told = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"a step behind a prompt pruned between layers needs a 2-D attention_mask of {columns} columns or none, "
            f"got {told}"
        )
    return seen & mask.to(like.device).bool()[:, None, None, columns - new :]


def later_mask(config: Any, hidden: torch.Tensor, real: torch.Tensor, behind: torch.Tensor) -> Any:
    """Of a step behind the prompt: the kept columns, then the new ones.

    Args:
        hidden: ``(B, Q, D)``. real: ``(B, S')`` bool. behind: of `open_behind`.
    """
    real = real.to(hidden.device).repeat_interleave(len(hidden) // len(real), 0)
    behind = behind.expand(len(real), -1, -1, -1)
    if uses_flash(config):
        columns = torch.cat([real, behind[:, 0, -1]], 1)
        return None if bool(columns.all()) else columns
    front = real[:, None, None].expand(-1, 1, hidden.shape[1], -1)
    return attention_form(config, hidden, torch.cat([front, behind], -1))


def later_window(
    config: Any, hidden: torch.Tensor, columns: torch.Tensor, behind: torch.Tensor, held: int, window: int
) -> Any:
    """As `later_mask` of a layer that holds a window: by the columns of the prompt, which the cache counts no more.

    Args:
        columns: ``(B, S' + new)`` int64: where tokens stand, the step's last; -1 for those that nobody sees.
        held: columns in the layer's cache. window: tokens that are seen, a token's own with them.
    """
    queries = hidden.shape[1]
    columns = columns.to(hidden.device).repeat_interleave(len(hidden) // len(columns), 0)
    keys, rows = columns[:, None, None, -(held + queries) :], columns[:, None, -queries:, None]
    visible = (keys >= 0) & (keys <= rows) & (rows - keys < window)
    shared = min(behind.shape[-1], visible.shape[-1])
    visible = torch.cat([visible[..., :-shared], visible[..., -shared:] & behind[..., -shared:]], -1)
    return attention_form(config, hidden, visible)
