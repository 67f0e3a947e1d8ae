"""The masks that transformers makes for a decoder, by kind of layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import masking_utils

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def causal_mask(config: Any, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
    """The mask of full-attention layers, in the form that the decoder's attention function takes.

    Args:
        config: the decoder's. embeds: ``(B, queries, any)``, for its shape, dtype and device.
        mask: ``(B, columns)``, nonzero = real; None = all.
    """
    return masking_utils.create_causal_mask(config, embeds, mask, cache, None)


def sliding_mask(config: Any, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
    """As `causal_mask`, of sliding-window layers; the window goes by cache index."""
    return masking_utils.create_sliding_window_causal_mask(config, embeds, mask, cache, None)


def masks_by_kind(config: Any, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
    """As `causal_mask`, one for each kind of layer where the decoder has several."""
    return masking_utils.create_masks_for_generate(config, embeds, mask, cache, None)


def opened(mask: torch.Tensor) -> torch.Tensor:
    """A dense mask, bool or additive, as bool: True where a query sees a slot."""
    return mask if mask.dtype == torch.bool else mask == 0


def attention_form(config: Any, embeds: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A bool mask ``(B, 1, queries, slots)`` in the form that the decoder's attention takes."""
    implementation = config._attn_implementation
    if implementation == "eager":
        return torch.where(visible, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
    if implementation == "sdpa":
        return visible
    if "flash" in implementation and visible.shape[1] == embeds.shape[1] == 1:
        return visible[:, 0, 0]
    raise NotImplementedError(
        "layers or heads with tokens of their own, and text eviction with a static cache, need attn_implementation "
        f"'sdpa' or 'eager' here, got {implementation!r}; TextEviction(scope='decoder') needs none if the cache grows"
    )
