"""What the tokens of a layer may see where earlier layers hold more of the prompt."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.hf.flash import uses_flash
from asymvlm.hf.masks import attention_form


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
        found = mask if mask.dtype == torch.bool else mask == 0
        found = found.expand(len(chosen), -1, -1, -1)
        across = rows.expand(-1, -1, -1, found.shape[-1])
        block = found.gather(2, across).gather(3, columns.expand(-1, -1, chosen.shape[1], -1))
    else:
        block = columns <= rows
    own = torch.eye(chosen.shape[1], dtype=torch.bool, device=hidden.device)  # a row that sees nothing would be NaN
    return attention_form(config, hidden, (block & real[:, None, None]) | own)


def later_mask(config: Any, hidden: torch.Tensor, mask: Any, real: torch.Tensor, new: int) -> Any:
    """Of a step behind the prompt: the kept columns, then what the model's own mask says of the new ones.

    Args:
        hidden: ``(B, Q, D)``. mask: the model's own. real: ``(B, S')`` bool. new: columns behind the prompt, those of
            the step with them.
    """
    queries = hidden.shape[1]
    real = real.to(hidden.device).repeat_interleave(len(hidden) // len(real), 0)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return torch.cat([real.to(mask), mask[:, -new:]], 1)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        behind = (mask if mask.dtype == torch.bool else mask == 0)[..., -new:]
    else:
        behind = real.new_ones((queries, new)).tril(new - queries)[None, None]
    if uses_flash(config):
        return None if bool(real.all()) else torch.cat([real, real.new_ones((len(real), new))], 1)
    front = real[:, None, None].expand(-1, 1, queries, -1)
    return attention_form(config, hidden, torch.cat([front, behind.expand(len(real), -1, -1, -1)], -1))


def later_window(
    config: Any, hidden: torch.Tensor, mask: Any, columns: torch.Tensor, held: int, window: int, new: int
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
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:  # what a caller's mask closes behind the prompt stays closed
        shared = min(new, mask.shape[-1], visible.shape[-1])
        own = mask if mask.dtype == torch.bool else mask == 0
        visible = torch.cat([visible[..., :-shared], visible[..., -shared:] & own[..., -shared:]], -1)
    return attention_form(config, hidden, visible)
