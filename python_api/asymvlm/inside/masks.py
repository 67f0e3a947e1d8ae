"""What the tokens of a layer may see where earlier layers hold more of the prompt."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.hf.flash import uses_flash
from asymvlm.hf.masks import attention_form


def visible_block(mask: Any, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """``(B, 1, S, S)`` bool: what may see what, by the model's own mask; a causal one where it made none."""
    rows, columns = shape
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        found = mask if mask.dtype == torch.bool else mask == 0
        return found[..., -columns:].expand(rows, -1, -1, -1)
    return torch.ones((columns, columns), dtype=torch.bool, device=device).tril().expand(rows, 1, -1, -1)


def picked(block: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Rows and columns ``chosen`` ``(B, S')`` of ``(B, 1, S, S)``."""
    chosen = chosen.to(block.device)
    rows = chosen[:, None, :, None].expand(-1, -1, -1, block.shape[-1])
    columns = chosen[:, None, None].expand(-1, -1, chosen.shape[1], -1)
    return block.gather(2, rows).gather(3, columns)


def stage_mask(config: Any, hidden: torch.Tensor, block: torch.Tensor, real: torch.Tensor) -> Any:
    """The mask of a stage's layers while the prompt is prefilled, in the form of the decoder's attention.

    Args:
        hidden: ``(B, S', D)``. block: ``(B, 1, S', S')`` bool. real: ``(B, S')`` bool, columns that are seen at all.
    """
    if uses_flash(config):
        return None if bool(real.all()) else real
    own = torch.eye(block.shape[-1], dtype=torch.bool, device=block.device)  # a row that sees nothing would be NaN
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
