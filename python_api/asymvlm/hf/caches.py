"""transformers' K/V caches: the classes ours are built on, and what a cache holds, told without synchronising."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "cache_rows",
    "is_full",
    "is_known_layer",
    "is_sliding",
    "lengths_on_host",
    "stock_layers",
]


def stock_layers(text_config: Any, static_length: int | None) -> list[Any]:
    """The layers that transformers would make for a decoder; ``static_length`` columns, or None to grow."""
    if static_length is None:
        return list(DynamicCache(config=text_config).layers)
    return list(StaticCache(text_config, max_cache_len=static_length).layers)


def is_full(layer: Any) -> bool:
    """Whether a layer of `stock_layers` holds K and V of every token."""
    return type(layer) in (DynamicLayer, StaticLayer)


def is_sliding(layer: Any) -> bool:
    """Whether a layer of `stock_layers` holds K and V of a window."""
    return type(layer) in (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


def is_known_layer(layer: Any) -> bool:
    """Whether a layer of `stock_layers` is left as it is: it slides, or carries a state instead of K and V."""
    return is_sliding(layer) or not isinstance(layer, CacheLayerMixin)


def cache_rows(cache: Any, unknown: int) -> int:
    """Rows of a cache, by the keys of its first layer that holds some; ``unknown`` where none does."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.ndim == 4:
            return len(keys)
    return unknown


def lengths_on_host(cache: Any) -> Iterator[tuple[int, int]]:
    """Layer number and columns held, for the layers that grow with every token: counts and shapes, no tensor is read.

    Layers whose count is on a device other than the CPU are left out.
    """
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if getattr(layer, "is_sliding", False) or not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        length = layer.get_seq_length()
        if not isinstance(length, torch.Tensor) or length.device.type == "cpu":
            yield number, int(length)
