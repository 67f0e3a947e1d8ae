"""Positions of the tokens of a call: those of the unpruned run, or renumbered. 1-D ``(B, S)``, M-RoPE ``(R, B, S)``."""

from __future__ import annotations

import torch

from asymvlm.hf.arguments import POSITIONS
from asymvlm.hf.errors import MechanismError
from asymvlm.models.adapter import Adapter, Inputs


def original_positions(
    adapter: Adapter,
    inputs: Inputs,
    record: Inputs,
    mask: torch.Tensor,
    *,
    generating: bool,
    start: torch.Tensor | None,
) -> torch.Tensor:
    """The positions the unpatched model would use: ``(B, S)``, or ``(R, B, S)`` for M-RoPE.

    Args:
        inputs, mask: of the call, whose own ``position_ids`` win.
        record: what the composite worked out for M-RoPE, counted from 0.
        generating: count real tokens, as `generate` does, instead of columns.
        start: position of the first token where others are in a cache already, ``(B, 1)`` or ``(R, B, 1)``.
    """
    B, S = mask.shape
    positions = inputs.get(POSITIONS)
    if positions is None:
        derived = adapter.mrope and all(inputs.get(name) is not None for name in adapter.drop_when_pruned)
        if derived and record.get(POSITIONS) is None:
            raise MechanismError("positions in images", f"the decoder of {adapter.model_type!r} was handed none")
        if adapter.mrope and record.get(POSITIONS) is not None:
            positions = record[POSITIONS]
        elif generating:
            positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        else:
            positions = torch.arange(S, device=mask.device)[None] + (adapter.first_position if start is None else 0)
        positions = positions if start is None else positions + start
    return positions.expand(*positions.shape[:-2], B, S)


def next_position(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of the first token behind ``positions``: ``(B, 1)`` or ``(R, B, 1)``."""
    if positions.ndim == 2:
        return positions[:, -1:] + 1
    # an image at the end leaves the three axes apart: text goes on from the largest
    last = positions.masked_fill(~real, -1).amax(dim=(0, 2)) + 1
    return last[None, :, None].expand(positions.shape[0], -1, -1)


def renumbered(
    kept: torch.Tensor, positions: torch.Tensor, adapter: Adapter, *, generating: bool, start: torch.Tensor | None
) -> torch.Tensor:
    """Of the kept tokens ``kept`` ``(B, S')``, one after the other, from ``start`` or from the model's first."""
    if generating or adapter.mrope:
        compact = (kept.long().cumsum(-1) - 1).clamp_min(0)
    else:
        compact = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        compact = compact + (adapter.first_position if start is None else 0)
    compact = compact if start is None else compact + start
    return compact.expand(*positions.shape[:-2], *kept.shape).contiguous()
