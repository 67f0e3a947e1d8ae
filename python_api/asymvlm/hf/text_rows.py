"""Text rows by themselves: they attend to the vision keys and values that a whole pass left behind.

A whole pass of the decoder leaves, for every attention layer, keys, values and mask. A second pass takes only the text
tokens as its input; in each layer their own new keys and values stand in their columns, and those of the first pass in
all others. So vision tokens see nothing of what is changed for the second pass, and none of their work is done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from asymvlm.hf.context import Frame


@dataclass(frozen=True, eq=False)
class Layer:
    """What one attention layer was given in a whole pass."""

    key: torch.Tensor  # (B, H, S, head_dim), with positions
    value: torch.Tensor  # (B, H, S, value_dim)
    mask: torch.Tensor | None  # (B, 1, S, S) additive, (B, S) causal with -inf on padding, or None for causal alone


@dataclass(eq=False, kw_only=True)
class Remembering(Frame):
    """A whole pass whose layers are remembered, by their attention module."""

    layers: dict[nn.Module, Layer] = field(default_factory=dict)

    def take(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Note what ``module`` was given; arguments as of `Layer`.

        Raises:
            ValueError: if a module attends twice in one pass, so that nobody could tell which is meant.
        """
        if module in self.layers:
            raise ValueError(
                f"{type(module).__name__} attends twice in a pass: its text rows cannot be run by themselves"
            )
        self.layers[module] = Layer(key, value, mask)


@dataclass(eq=False, kw_only=True)
class TextRows(Frame):
    """A pass of text rows alone.

    Attributes:
        layers: of a whole pass of the same batch.
        index: ``(B, T)`` int64, the columns of the rows, ascending, padded with -1.
        bias: ``(B, S)`` fp32, added to the attention logits of every key.
    """

    layers: dict[nn.Module, Layer]
    index: torch.Tensor
    bias: torch.Tensor

    def joined(
        self, module: nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of all S columns, and the additive mask ``(B, 1, T, S)`` of the rows.

        Args:
            key, value: ``(B, H, T, ...)`` of the rows. Differentiable in both.
        """
        layer = self.layers[module]
        S = layer.key.shape[2]
        place = torch.arange(S, device=key.device).repeat(len(self.index), 1)  # in the old columns, then the new
        rows = torch.where(self.index >= 0, self.index, S)
        source = torch.nn.functional.pad(place, (0, 1)).scatter(
            1, rows, S + torch.arange(rows.shape[1], device=key.device).expand_as(rows)
        )[:, None, :S, None]
        whole = [
            torch.cat([old, new], 2).gather(2, source.expand(-1, new.shape[1], -1, new.shape[3]))
            for old, new in ((layer.key, key), (layer.value, value))
        ]
        return whole[0], whole[1], self._mask(layer.mask, key.dtype)

    def _mask(self, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        B, T = self.index.shape
        S, rows = self.bias.shape[1], self.index.clamp_min(0)
        lowest, bias = torch.finfo(dtype).min, self.bias[:, None, None].to(dtype)
        if mask is not None and mask.ndim == 4:
            own = mask.expand(B, 1, -1, -1).gather(2, rows[:, None, :, None].expand(-1, -1, -1, S))
            return (own + bias).clamp_min(lowest)
        seen = torch.arange(S, device=rows.device) <= rows[..., None]
        if mask is not None:
            seen = seen & (mask > float("-inf"))[:, None]
        return torch.where(seen[:, None], bias, lowest)


def dummy_masks(mask: Any, index: torch.Tensor, embeds: torch.Tensor) -> Any:
    """In the place of masks that a composite made for all rows: of the shape of ``index``, and read by nobody."""
    if isinstance(mask, dict):
        return {kind: dummy_masks(own, index, embeds) for kind, own in mask.items()}
    if mask is None or mask.ndim == 4:
        return embeds.new_zeros(*index.shape, index.shape[1])[:, None]
    return torch.ones(index.shape, dtype=torch.int64, device=embeds.device)


__all__ = ["Layer", "Remembering", "TextRows", "dummy_masks"]
