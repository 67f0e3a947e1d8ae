"""Attention masks of a decoder whose tokens lie in slots, and of its sliding layers, whose tokens lie in order.

transformers indexes a 2-D mask by slot number, and FlashAttention's takes its last columns: both are right until a slot
is freed. From then on the mask of the full-attention layers is made here, from the table of slots.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.fixed import StaticSlots
from asymvlm.cache.growing import Slots
from asymvlm.hf.masks import FULL, SLIDING, causal_mask, sliding_mask


def real_tokens(cache: EvictionCache, mask: Any, queries: int) -> torch.Tensor | None:
    """``(B, queries)`` bool: which of the step's tokens are no padding, before it has its slots; None = all.

    A dense mask tells it too: a token that may not see itself is padding.
    """
    table = cache.table
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if isinstance(table, Slots) and mask.shape[1] != table.length + queries:
            raise ValueError(
                f"attention_mask must have {table.length + queries} columns, one for each token so far and each new "
                f"one, got shape {tuple(mask.shape)}"
            )
        return mask[:, -queries:].bool()
    if table.prompt_mask is not None:
        start = int(table.length) if table.rows else 0
        part = table.prompt_mask[:, start : start + queries]
        return part if part.shape[1] == queries else None
    if queries == 1:
        return None
    dense = mask.get(FULL) if isinstance(mask, dict) else mask
    if not isinstance(dense, torch.Tensor) or (cache.is_static and table.rows):
        return None
    block = dense[:, 0, :, :queries] if cache.is_static else dense[:, 0, :, -queries:]
    diagonal = block.diagonal(dim1=1, dim2=2)
    return diagonal if diagonal.dtype == torch.bool else diagonal == 0


def slot_masks(config: Any, cache: EvictionCache, mask: Any, embeds: torch.Tensor, hide_in_sliding: bool) -> Any:
    """The decoder's ``attention_mask`` for a step that has its slots.

    Args:
        config: the decoder's.
        mask: what the decoder was called with: None, 2-D, dense, or a dict of dense ones by kind of layer.
        embeds: ``(B, queries, any)``, for its shape, dtype and device.
        hide_in_sliding: whether sliding layers lose sight of evicted tokens.
    Raises:
        ValueError: for a dense mask of another width.
        NotImplementedError: for a static cache under an attention that takes no dense masks.
    """
    table, queries, sliding = cache.table, embeds.shape[1], cache.sliding_index
    full: Any
    if isinstance(table, StaticSlots):
        full = _like(config, embeds, table.visible()[:, None])
    else:
        visible = table.visible()
        given = mask.get(FULL) if isinstance(mask, dict) else mask
        if isinstance(given, torch.Tensor) and given.ndim == 4:
            if queries == 1 and given.shape[-1] != table.span:
                raise ValueError(
                    f"a dense mask must cover the {table.span} slots in use, got {tuple(given.shape)}: pass the 2-D one"
                )
            full = _remade(given, visible, table.span, queries)
        elif not isinstance(mask, dict) and sliding is None:
            return visible  # the decoder makes the rest
        else:
            full = causal_mask(config, embeds, visible, cache)
    if sliding is None:
        return {**mask, FULL: full} if isinstance(mask, dict) else full
    return {**(mask if isinstance(mask, dict) else {}), FULL: full, SLIDING: _sliding(
        config, cache, mask, embeds, sliding, hide_in_sliding
    )}  # fmt: skip


def _sliding(config: Any, cache: EvictionCache, mask: Any, embeds: torch.Tensor, layer: int, hide: bool) -> Any:
    given: Any = mask.get(SLIDING) if isinstance(mask, dict) else None
    dense = isinstance(given, torch.Tensor) and given.ndim == 4
    if isinstance(mask, dict) and not (hide or dense):
        return given
    if not dense and not hide:
        return sliding_mask(config, embeds, mask, cache)
    keys, offset = cache.get_mask_sizes(embeds.shape[1], layer)
    if not dense:
        columns = cache.table.alive(0, keys + offset)
        return sliding_mask(config, embeds, columns, cache)
    if not hide:
        return given
    alive = cache.table.alive(offset, keys)[:, None, None]
    return given.masked_fill(~alive, False if given.dtype == torch.bool else torch.finfo(given.dtype).min)


def _remade(given: torch.Tensor, visible: torch.Tensor | None, slots: int, queries: int) -> torch.Tensor:
    """A dense mask ``(B, 1, queries, slots)`` in the form of ``given``, which was made by column.

    All slots before the step by what is ``visible``. New tokens see the new ones before them, and those behind them
    that ``given`` lets them see: the family's own code says that a token of an image sees all of it.
    """
    allowed = given if given.dtype == torch.bool else given == 0
    if visible is None:
        visible = torch.ones((len(given), slots), dtype=torch.bool, device=given.device)
    mask = visible[:, None, None].repeat(1, 1, queries, 1)
    if queries > 1:
        mask[..., -queries:] &= allowed[..., -queries:] | allowed.new_ones((queries, queries)).tril()
    if given.dtype == torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(given.dtype).min).to(given.dtype)


def _like(config: Any, embeds: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A bool mask ``(B, 1, queries, slots)`` in the form that the decoder's attention takes."""
    implementation = config._attn_implementation
    if implementation == "eager":
        return torch.where(visible, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
    if implementation == "sdpa":
        return visible
    if "flash" in implementation and embeds.shape[1] == 1:
        return visible[:, 0, 0]
    raise NotImplementedError(
        f"a static cache with text eviction needs attn_implementation 'sdpa' or 'eager' here, got {implementation!r}"
    )
