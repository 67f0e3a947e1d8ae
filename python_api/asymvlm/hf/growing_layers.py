"""Layers of a growing K/V cache whose columns are moved: sliding ones are held whole meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

WHOLE = 1 << 40  # columns: a window that nothing leaves


def check_grows(cache: Any) -> None:
    """Refuse a cache whose layers are not tensors that grow with every token.

    Raises:
        NotImplementedError: naming what was found.
    """
    others = {type(layer).__name__ for layer in cache.layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if others or getattr(cache, "offloading", False):
        found = "an offloaded cache" if not others else f"one with {', '.join(sorted(others))}"
        raise NotImplementedError(f"recall needs a cache that grows (DynamicCache, on one device a layer), got {found}")


def widest_past(cache: Any) -> int:
    """Most columns of a cache that every layer still holds."""
    windows = [layer.sliding_window - 1 for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(windows, default=WHOLE)


@contextlib.contextmanager
def grown_whole(cache: Any) -> Iterator[None]:
    """A block in which sliding layers hold all columns; if it fails, the cache is as it was."""
    names = ("keys", "values", "sliding_window", "cumulative_length")
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in cache.layers]
    try:
        for layer in cache.layers:
            if layer.is_sliding:
                layer.sliding_window = WHOLE
        yield
        for layer, was in zip(cache.layers, before, strict=True):
            if layer.is_sliding:
                layer.sliding_window = was["sliding_window"]
                for name in ("keys", "values"):
                    setattr(layer, name, getattr(layer, name)[:, :, -layer.sliding_window + 1 :].contiguous())
    except BaseException:
        for layer, was in zip(cache.layers, before, strict=True):
            vars(layer).update(was)
        raise


def move_columns(cache: Any, order: torch.Tensor) -> None:
    """Put column ``order[:, j]`` of each row to column j, in all layers; ``order`` ``(B, columns)`` may spare some."""
    for layer in cache.layers:
        if layer.is_sliding:  # which counts what it has seen
            layer.cumulative_length = order.shape[1]
        for name in ("keys", "values"):
            held = getattr(layer, name)
            index = order.to(held.device)[:, None, :, None]
            setattr(layer, name, held.gather(2, index.expand(*held.shape[:2], -1, held.shape[3])))
