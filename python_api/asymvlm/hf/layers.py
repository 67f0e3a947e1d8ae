"""Between two decoder layers: what a layer is about to get, under our names, for some layers of one decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import CACHE_NAMES, MASK, POSITIONS
from asymvlm.hf.attention import Reached
from asymvlm.hf.errors import MechanismError

MECHANISM = "pruning between layers"
ROTARY = "position_embeddings"
HIDDEN = "hidden_states"
Rotary = tuple[torch.Tensor, ...]


class LayerDoors:
    """Pre-hooks on decoder layers.

    Args:
        layers: of the decoder. numbers: which of them.
        enter: gets the layer's number, its hidden states ``(B, S, D)`` and its other arguments; returns the hidden
            states and the arguments to change, or None for the same.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        numbers: Sequence[int],
        enter: Callable[[int, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, dict[str, Any]] | None],
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
                raise MechanismError(MECHANISM, f"layer {number} was called with other arguments")
            found = self._enter(number, hidden, kwargs)
            if found is None:
                return None
            hidden, changed = found
            kwargs = {**kwargs, **changed}
            if args:
                return (hidden,), kwargs
            return (), {**kwargs, HIDDEN: hidden}

        return before


def rotary_of(kwargs: dict[str, Any], number: int) -> Rotary:
    """The rotary embeddings that a layer is called with, each ``(..., 1 or B, S, D)``.

    Raises:
        MechanismError: if there are none.
    """
    rotary = kwargs.get(ROTARY)
    if not (isinstance(rotary, tuple) and all(isinstance(part, torch.Tensor) for part in rotary)):
        raise MechanismError(MECHANISM, f"layer {number} was called without {ROTARY}")
    return rotary


def at_columns(rotary: Rotary, columns: torch.Tensor) -> dict[str, Any]:
    """Arguments of a layer: rotary embeddings of ``columns`` ``(B, S')``.

    Positions are taken away: gapped ones would be read as packed sequences.
    """
    return {ROTARY: tuple(_columns_of(part, columns.to(part.device)) for part in rotary), POSITIONS: None}


def _columns_of(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``(..., B, S, D)`` at ``columns`` ``(B, S')``, a batch of one repeated."""
    batch, width = columns.shape[0], rows.shape[-1]
    rows = rows.expand(*rows.shape[:-3], batch, *rows.shape[-2:])
    return rows.gather(-2, columns[..., None].expand(*rows.shape[:-2], columns.shape[1], width))


@torch.no_grad()
def score_only(layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Run a layer up to its attention, for the step in hand, which wants scores only. Nothing enters the cache.

    The layer itself makes its queries and keys, so its norm and projections may be called what they like.

    Raises:
        MechanismError: if it does not attend by our function.
    """
    without_cache = {name: None if name in CACHE_NAMES else value for name, value in kwargs.items() if name != HIDDEN}
    try:
        layer.forward(hidden, **{**without_cache, MASK: None})
    except Reached:
        return
    raise MechanismError(MECHANISM, f"a {type(layer).__name__} did not reach its attention")


__all__ = ["HIDDEN", "MASK", "MECHANISM", "ROTARY", "LayerDoors", "Rotary", "at_columns", "rotary_of", "score_only"]
