"""Floating-point work by the formula of the paper (section 4, efficiency), and bytes as the cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

STATIC = "max_cache_len"  # an attribute of layers that are allocated ahead
QUANTIZED = "_quantized_keys"  # an attribute of transformers' quantized layers, whatever their backend


def layer_flops(n: int, d: int, m: int, *, span: int | None = None) -> int:
    """One decoder layer: ``4nd^2 + 2n^2d + 3ndm`` (projections, attention, gated MLP), as in the paper.

    Args:
        n: tokens. d: width. m: inner width of the MLP.
        span: tokens that each one attends to, where attention is windowed; n if None.
    """
    return 4 * n * d * d + 2 * n * (n if span is None else span) * d + 3 * n * d * m


def decoder_flops(text_config: Any, n: int) -> int:
    """The language model over ``n`` prompt tokens; the vision tower is reported apart."""
    return int(text_config.num_hidden_layers) * layer_flops(n, text_config.hidden_size, text_config.intermediate_size)


def clip_tower_flops(vision_config: Any, pixel_shape: Sequence[int], *, class_token: bool = True) -> int:
    """A CLIP or SigLIP tower over ``(images, channels, height, width)``: its MLP has two matrices, not three."""
    images, _, height, width = pixel_shape
    patch = vision_config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    n = (height // patch_height) * (width // patch_width) + class_token
    d, m = vision_config.hidden_size, vision_config.intermediate_size
    per_layer = layer_flops(n, d, m) - n * d * m
    return int(images * vision_config.num_hidden_layers * per_layer)


def cache_bytes(cache: Any, held: int | None = None) -> int | None:
    """Bytes of K and V in a transformers cache: of ``held`` columns, without slots allocated ahead, or all there are.

    None without a cache, or where K and V are quantized.
    """
    layers = layer_bytes(cache, held)
    return None if layers is None else sum(layers)


def layer_bytes(cache: Any, held: int | None = None) -> list[int] | None:
    """The same for each layer."""
    layers = getattr(cache, "layers", None)
    if layers is None or any(hasattr(layer, QUANTIZED) for layer in layers):
        return None  # a quantized layer keeps most of them in its backend's own form
    return [sum(_column_bytes(x) * _columns(layer, x, held) for x in _tensors(layer)) for layer in layers]


def whole_cache_bytes(cache: Any, wanted: int, window: int | None) -> int | None:
    """Bytes the same cache would hold for ``wanted`` columns in each layer, whatever numbers they hold now."""
    if cache_bytes(cache) is None:
        return None
    total = 0
    for layer in cache.layers:
        slides = window is not None and getattr(layer, "is_sliding", False)
        columns = min(wanted, window - 1) if slides and window is not None else wanted  # the token to come has a place
        total += sum(_column_bytes(tensor) * columns for tensor in _tensors(layer))
    return total


def unpruned_cache_bytes(cache: Any, held: int, wanted: int, window: int | None) -> int | None:
    """Bytes the same cache would hold for ``wanted`` columns, not ``held``; sliding layers stop at their window."""
    if cache_bytes(cache, held) is None:
        return None
    total = 0
    for layer in cache.layers:
        for tensor in _tensors(layer):
            columns = _columns(layer, tensor, held)
            unpruned = columns + wanted - held
            if window is not None and getattr(layer, "is_sliding", False):
                # a growing layer keeps the window less the token to come, a static one all of it
                unpruned = max(columns, min(unpruned, window if hasattr(layer, STATIC) else window - 1))
            total += _column_bytes(tensor) * unpruned
    return total


def _tensors(layer: Any) -> list[torch.Tensor]:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()]


def _columns(layer: Any, tensor: torch.Tensor, held: int | None) -> int:
    """Columns of K or V that are filled."""
    columns = tensor.shape[-2]
    return columns if held is None or not hasattr(layer, STATIC) else min(held, columns)


def _column_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[-2] * tensor.element_size()
