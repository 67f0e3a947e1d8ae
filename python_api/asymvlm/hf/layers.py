"""Between two decoder layers: what a layer is about to get, under our names, for some layers of one decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import MASK, POSITIONS
from asymvlm.hf.errors import MechanismError

ROTARY = "position_embeddings"
HIDDEN = "hidden_states"


class LayerDoors:
    """Pre-hooks on decoder layers.

    Args:
        layers: of the decoder. numbers: which of them.
        enter: gets the layer's number, its hidden states ``(B, S, D)`` and its mask; returns the hidden states, the
            mask and ``(B, S')`` int64 columns of the S that the rotary embeddings are wanted of, or None for all.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        numbers: Sequence[int],
        enter: Callable[[int, torch.Tensor, Any], tuple[torch.Tensor, Any, torch.Tensor | None] | None],
    ) -> None:
        self._enter = enter
        self._hooks = [
            layers[number].register_forward_pre_hook(self._hook(number), with_kwargs=True) for number in numbers
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs.get(HIDDEN)
            if not isinstance(hidden, torch.Tensor) or len(args) > 1:
                raise MechanismError("pruning between layers", f"layer {number} was called with other arguments")
            found = self._enter(number, hidden, kwargs.get(MASK))
            if found is None:
                return None
            hidden, mask, columns = found
            kwargs = {**kwargs, MASK: mask}
            if columns is not None:
                kwargs |= _picked(kwargs, columns, number)
            if args:
                return (hidden,), kwargs
            return (), {**kwargs, HIDDEN: hidden}

        return before


def _picked(kwargs: dict[str, Any], columns: torch.Tensor, number: int) -> dict[str, Any]:
    """Rotary embeddings of the columns. Positions are taken away: gapped ones would be read as packed sequences."""
    rotary = kwargs.get(ROTARY)
    if not (isinstance(rotary, tuple) and all(isinstance(part, torch.Tensor) for part in rotary)):
        raise MechanismError("pruning between layers", f"layer {number} was called without {ROTARY}")
    return {ROTARY: tuple(_columns_of(part, columns) for part in rotary), POSITIONS: None}


def _columns_of(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``(..., B, S, D)`` at ``columns`` ``(B, S')``, a batch of one repeated."""
    batch, width = columns.shape[0], rows.shape[-1]
    rows = rows.expand(*rows.shape[:-3], batch, *rows.shape[-2:])
    return rows.gather(-2, columns[..., None].expand(*rows.shape[:-2], columns.shape[1], width))
