"""Sliding-window layers measure distance in the original sequence, not in the shortened one; chunks are cut there.

transformers windows by cache index. Once tokens are gone, an index window reaches further back than the model was
trained for. Kept tokens are never further apart by index than by origin, so the layer's cache holds all that is needed
and the model's own mask only has to be tightened. Chunks have other borders, so their mask is made anew. A pre-hook of
the decoder does that, whatever made the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from asymvlm.hf.arguments import CACHE, EMBEDS, MASK, past_length
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.flash import uses_flash
from asymvlm.hf.masks import CHUNKED, FULL, SLIDING, causal_mask, masks_by_kind


def sliding_window(text_config: Any) -> int | None:
    """Width of the decoder's sliding (chunked) layers in tokens; None where it has none, or none that could be left."""
    kinds, kind = getattr(text_config, "layer_types", None), _kind(text_config)
    window = getattr(text_config, "attention_chunk_size" if kind == CHUNKED else "sliding_window", None)
    if window is None or window >= text_config.max_position_embeddings or (kinds is not None and kind not in kinds):
        return None
    return int(window)


def _kind(text_config: Any) -> str:
    return CHUNKED if CHUNKED in (getattr(text_config, "layer_types", None) or ()) else SLIDING


def tighten(text_config: Any, inputs: Mapping[str, Any], index: torch.Tensor, original_length: int) -> Any:
    """Close what lies outside the window, or the chunk, by original place in the mask of the sliding layers.

    Args:
        text_config: the decoder's, with sliding layers.
        inputs: the decoder's arguments. Its masks are made here as transformers does, unless they are given by layer
            kind or dense: None (causal), bool or additive ``(B, 1, queries, keys)``, or a `BlockMask`.
        index: ``(B, S')`` int64 original places of the kept prompt tokens, -1 = padding.
        original_length: S; the t-th token after the prompt has place S + t.
    Returns:
        The ``attention_mask`` for the decoder.
    Raises:
        NotImplementedError: for FlashAttention, whose windows go by index.
    """
    masks, embeds, cache = inputs.get(MASK), inputs[EMBEDS], inputs.get(CACHE)
    kind, window, queries = _kind(text_config), sliding_window(text_config), embeds.shape[1]
    assert window is not None
    past = past_length(cache)
    length = index.shape[1]
    if original_length + past + queries - length <= window:
        return masks  # nothing is out of reach yet
    if uses_flash(text_config):
        raise NotImplementedError(
            f"FlashAttention cannot window {original_length + past + queries - length} tokens by original position "
            f"(window {window}): use attn_implementation 'sdpa', 'eager' or 'flex_attention', or positions='compact'"
        )
    if masks is None or (isinstance(masks, torch.Tensor) and masks.ndim == 2):
        if kind == CHUNKED:  # transformers 5.17 fails to make both
            masks = {FULL: causal_mask(text_config, embeds, masks, cache)}
        else:
            masks = masks_by_kind(text_config, embeds, masks, cache)
    lent = FULL if kind == CHUNKED else kind
    if isinstance(masks, dict) and lent not in masks:
        raise MechanismError("windows by original position", f"masks came for {', '.join(masks)}, none for {lent}")
    mask = masks[lent] if isinstance(masks, dict) else masks
    if not (mask is None or isinstance(mask, BlockMask) or (isinstance(mask, torch.Tensor) and mask.ndim == 4)):
        raise NotImplementedError(f"windows by original position need dense or block masks, got {type(mask).__name__}")
    keys, offset = queries, 0
    if cache is not None:
        kinds = getattr(cache, "is_sliding", [])
        keys, offset = cache.get_mask_sizes(queries, kinds.index(True) if True in kinds else 0)
    places = _places(index, original_length, max(past + queries, offset + keys))
    query, key = places[:, past : past + queries, None], places[:, None, offset : offset + keys]
    causal = torch.arange(past, past + queries, device=index.device)[:, None] >= torch.arange(
        offset, offset + keys, device=index.device
    )
    if kind == CHUNKED:
        start = index.where(index >= 0, original_length).amin(1)[
            :, None, None
        ]  # chunks are counted from the first token
        near = ((query - start) // window == (key - start) // window) & (key >= 0) & causal
    else:
        near = query - key < window
    near = near[:, None]  # (B, 1, queries, keys)
    if near.shape[0] != embeds.shape[0]:  # beams, num_return_sequences
        near = near.repeat_interleave(embeds.shape[0] // near.shape[0], 0)
    if mask is None:
        mask = near & causal
    elif isinstance(mask, BlockMask):
        mask = _block_mask(near[:, 0], None if kind == CHUNKED else mask)
    else:
        closed, opened = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0)
        # the full layers' mask only lends its form to the chunked ones'
        mask = mask.new_full(near.shape, opened) if kind == CHUNKED else mask
        mask = mask.masked_fill(~near, closed)
    return {**masks, kind: mask} if isinstance(masks, dict) else mask


def _block_mask(near: torch.Tensor, mask: BlockMask | None) -> BlockMask:
    """Open where ``near`` ``(B, queries, keys)`` and, if given, ``mask`` are."""

    def is_open(row: Any, head: Any, query: Any, key: Any) -> Any:
        here = near[row, query, key]
        return here if mask is None else mask.mask_mod(row, head, query, key) & here

    batch, queries, keys = near.shape
    return create_block_mask(is_open, batch, None, queries, keys, device=str(near.device))


def _places(index: torch.Tensor, original_length: int, length: int) -> torch.Tensor:
    """Original places of the first ``length`` slots of the cache."""
    after = torch.arange(max(length - index.shape[1], 0), device=index.device) + original_length
    return torch.cat([index, after.expand(index.shape[0], -1)], 1)[:, :length]
