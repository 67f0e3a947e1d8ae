"""Where a model keeps its decoder layers."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder's layers: it makes the masks, even where the adapter calls a wrapper of it."""
    decoder = cast("Any", model).get_decoder()
    layers = getattr(decoder if hasattr(decoder, "layers") else getattr(decoder, "model", None), "layers", None)
    for module in model.modules():
        if layers is not None and module._modules.get("layers") is layers:
            return module
    raise ValueError(f"{type(model).__name__} has no decoder with a ModuleList 'layers', wanted one of that form")
