"""Floating-point work by the paper's formula, and bytes as the cache holds them (method: accounting)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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


def cache_bytes(cache: Any) -> int | None:
    """Bytes of K and V that a transformers cache holds now; None without a cache, or where they are quantized."""
    layers = getattr(cache, "layers", None)
    if layers is None or any(hasattr(layer, QUANTIZED) for layer in layers):
        return None  # a quantized layer keeps most of them in its backend's own form
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in _tensors(layer))


def unpruned_cache_bytes(cache: Any, dropped: int, window: int | None) -> int | None:
    """Bytes the same cache would hold with ``dropped`` more columns a layer; sliding layers stop at their window."""
    if cache_bytes(cache) is None:
        return None
    total = 0
    for layer in cache.layers:
        for tensor in _tensors(layer):
            columns = tensor.shape[-2]
            wanted = columns + dropped
            if window is not None and getattr(layer, "is_sliding", False):
                # a growing layer keeps the window less the token to come, a static one all of it
                wanted = max(columns, min(wanted, window if hasattr(layer, "max_cache_len") else window - 1))
            total += tensor.numel() // columns * wanted * tensor.element_size()
    return total


def _tensors(layer: Any) -> list[torch.Tensor]:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in tensors if tensor is not None and tensor.numel()]
