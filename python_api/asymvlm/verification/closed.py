"""Closed columns: an unpatched model runs on all tokens, and no query sees the keys of some of them.

The decoder's attention goes through a function of ours, registered by the public interface of transformers, which takes
the model's own mask, closes columns in it and calls the model's own attention. Positions, embeddings, cache and the
rest are those of an ordinary run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asymvlm.verification.names import decoder_of

Open = torch.Tensor | dict[int, torch.Tensor]
NAMES = {"sdpa": "asymvlm_verify_sdpa", "eager": "asymvlm_verify_eager"}
_closing: ContextVar[ClosedColumns | None] = ContextVar("asymvlm_verify_closing", default=None)


class ClosedColumns:
    """Which columns are open in each forward pass of one call, every pass reading all columns so far.

    Args:
        open_after: ``(B, columns)`` bool for the first pass, and one for each later one; the last stays in force.
            Columns beyond are open. In place of a tensor, ``(B, K/V heads or 1, columns)`` by number of layer; other
            layers close none.
        closes: whether a layer, by its number, closes columns; all do by default.
    """

    def __init__(self, open_after: list[Open], closes: Callable[[int], bool] = lambda layer: True) -> None:
        self.open_after = open_after
        self.closes = closes
        self.passes = 0
        self.columns = 0
        self._first: nn.Module | None = None
        self._made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # one for all layers that share one

    def mask(self, module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any) -> torch.Tensor:
        """The model's ``mask`` ``(B or 1, 1, queries, keys)``, bool or additive, with the closed columns closed."""
        if self._first is None:
            self._first = module
        if module is self._first:
            self.passes += 1
            self.columns += query.shape[2]
            self._made.clear()
        keys = key.shape[2]
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[-1] != keys:
            found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise RuntimeError(f"the decoder gave its attention a mask {found}, wanted a dense one of {keys} keys")
        layer = getattr(module, "layer_idx", 0)
        chosen = self.open_after[min(self.passes, len(self.open_after)) - 1]
        if not self.closes(layer) or (isinstance(chosen, dict) and layer not in chosen):
            return mask
        place = (id(mask), layer if isinstance(chosen, dict) else -1)
        if place not in self._made:
            wanted = chosen[layer] if isinstance(chosen, dict) else chosen[:, None]
            heads = query.shape[1] if wanted.shape[1] > 1 else 1
            wanted = wanted.repeat_interleave(heads // wanted.shape[1], 1)
            self._made[place] = (mask, self._close(mask, keys, wanted.to(mask.device)))
        return self._made[place][1]

    def _close(self, mask: torch.Tensor, keys: int, chosen: torch.Tensor) -> torch.Tensor:
        rest = self.columns - chosen.shape[-1]
        columns = nn.functional.pad(chosen, (0, rest), value=True)
        is_open = columns[:, :, None, self.columns - keys :]  # a windowed cache holds the last columns
        if mask.dtype == torch.bool:
            closed = mask & is_open
            # a query that would see nothing, of padding or of a dropped token, is nobody's key: it must only be finite
            return torch.where(closed.any(-1, keepdim=True), closed, mask)
        return mask.masked_fill(~is_open, torch.finfo(mask.dtype).min)


def reference_kind(model: nn.Module) -> str:
    """The attention that a masked run uses: the decoder's own where that takes dense masks, else sdpa or eager."""
    config = cast("Any", model.config).get_text_config()
    own = config._attn_implementation
    if own in NAMES:
        return str(own)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(decoder_of(model), "_supports_sdpa", True) and softcap is None else "eager"


@contextmanager
def closed_columns(model: nn.Module, columns: ClosedColumns) -> Iterator[None]:
    """Close columns in all calls of an unpatched model inside the block; its configurations are restored.

    Raises:
        RuntimeError: at the end, if no layer asked for its attention by ``config._attn_implementation``.
    """
    decoder: Any = decoder_of(model)
    modules = [decoder, *decoder.layers.modules()]
    found = [cast("Any", model.config).get_text_config(), *(m.config for m in modules if hasattr(m, "config"))]
    configs = list({id(config): config for config in found}.values())
    before = [config._attn_implementation for config in configs]
    name = NAMES[reference_kind(model)]
    token = _closing.set(columns)
    try:
        for config in configs:
            config._attn_implementation = {"": name}  # a plain string would reach the tower's configuration
        yield
    finally:
        for config, implementation in zip(configs, before):
            config._attn_implementation = {"": implementation}
        _closing.reset(token)
    if not columns.passes:
        raise RuntimeError(
            f"{type(decoder).__name__} does not choose its attention by config._attn_implementation: "
            "no column could be closed, so there is nothing to compare with"
        )


def _attend_with(kind: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *args: Any, **kw: Any
    ) -> Any:
        columns = _closing.get()
        if columns is None:
            raise RuntimeError(f"attention {NAMES[kind]!r} is for asymvlm.verify alone")
        if kind == "eager":
            inner = cast("Any", sys.modules[type(module).__module__]).eager_attention_forward
        else:
            inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return inner(module, query, key, value, columns.mask(module, query, key, mask), *args, **kw)

    return attend


def _always_dense(*args: Any, **kwargs: Any) -> Any:
    """transformers' own mask, made even where its sdpa could do without one."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


for _kind, _mask in (("sdpa", _always_dense), ("eager", eager_mask)):
    AttentionInterface.register(NAMES[_kind], _attend_with(_kind))
    AttentionMaskInterface.register(NAMES[_kind], _mask)
