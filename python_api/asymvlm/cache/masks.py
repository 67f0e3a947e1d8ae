"""Attention masks of a decoder whose tokens lie in slots, and of its sliding layers, whose tokens lie in order.

transformers indexes a 2-D mask by slot number, and FlashAttention's takes its last columns: both are right until a slot
is freed. From then on the mask of the full-attention layers is made here, from the table of slots.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.layers import SlotLayer
from asymvlm.cache.table import Table
from asymvlm.hf.masks import FULL, SLIDING, attention_form, causal_mask, opened, sliding_mask


def real_tokens(cache: EvictionCache, mask: Any, queries: int) -> torch.Tensor | None:
    """``(B, queries)`` bool: which of the step's tokens are no padding, before it has its slots; None = all.

    A dense mask tells it too: a token that may not see itself is padding.
    """
    table = cache.table
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        wanted = table.mask_columns(queries)
        if wanted is not None and mask.shape[1] != wanted:
            raise ValueError(
                f"attention_mask must have {wanted} columns, one for each token so far and each new one, got shape "
                f"{tuple(mask.shape)}"
            )
        return mask[:, -queries:].bool()
    if table.prompt_mask is not None:
        start = int(table.past) if table.rows else 0
        part = table.prompt_mask[:, start : start + queries]
        return part if part.shape[1] == queries else None
    if queries == 1:
        return None
    dense = mask.get(FULL) if isinstance(mask, dict) else mask
    if not isinstance(dense, torch.Tensor) or (cache.is_static and table.rows):
        return None
    block = dense[:, 0, :, :queries] if cache.is_static else dense[:, 0, :, -queries:]
    diagonal = block.diagonal(dim1=1, dim2=2)
    return opened(diagonal)


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
    visible = table.visible()
    if visible is not None and table.heads > 1:  # the layers get masks of their own, see `layer_masks`
        visible = visible.unflatten(0, (table.rows, table.heads)).any(1)
    given = mask.get(FULL) if isinstance(mask, dict) else mask
    slots = table.visible_slots(queries)
    if table.static:
        assert visible is not None
        full = attention_form(config, embeds, visible[:, None])
    elif isinstance(given, torch.Tensor) and given.ndim == 4:
        if queries == 1 and given.shape[-1] != slots:
            raise ValueError(
                f"a dense mask must cover the {slots} slots in use, got {tuple(given.shape)}: pass the 2-D one"
            )
        full = _remade(given, visible, slots, queries)
    else:
        columns = None if visible is None else visible[:, 0]
        if not isinstance(mask, dict) and sliding is None:
            return columns  # the decoder makes the rest
        full = causal_mask(config, embeds, columns, cache)
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
    allowed = opened(given)
    if visible is None:
        visible = torch.ones((len(given), 1, slots), dtype=torch.bool, device=given.device)
    mask = _in_order(visible[:, None], allowed[..., -queries:], queries)
    if given.dtype == torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(given.dtype).min).to(given.dtype)


def layer_masks(config: Any, cache: EvictionCache, mask: Any, embeds: torch.Tensor) -> dict[int, Any]:
    """The mask of each full-attention layer, by number, where layers or heads hold different tokens.

    Arguments as of `slot_masks`. ``(B, 1 or heads, queries, slots)`` in the form that the decoder's attention takes;
    None where a layer's tokens see all that is there.
    """
    given = mask.get(FULL) if isinstance(mask, dict) else mask
    queries, block = embeds.shape[1], None
    if isinstance(given, torch.Tensor) and given.ndim == 4:
        block = opened(given)[..., -queries:]
    made: dict[int, Any] = {}
    masks: dict[int, Any] = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, SlotLayer):
            if layer.table.layer not in made:
                made[layer.table.layer] = _own_mask(config, layer.table, block, embeds)
            masks[number] = made[layer.table.layer]
    return masks


def _own_mask(config: Any, table: Table, block: torch.Tensor | None, embeds: torch.Tensor) -> Any:
    """Of one group of layers. ``block`` ``(B, 1, queries, queries)``: how the step's tokens see each other."""
    visible, queries = table.visible(), embeds.shape[1]
    if visible is None and queries == 1:
        return None
    if visible is None:
        visible = embeds.new_ones((table.lines, 1, table.visible_slots(queries)), dtype=torch.bool)
    seen = _in_order(visible.unflatten(0, (table.rows, table.heads)), block, queries)
    return attention_form(config, embeds, seen)


def _in_order(visible: torch.Tensor, block: torch.Tensor | None, queries: int) -> torch.Tensor:
    """``(B, heads, 1, slots)`` of what is visible -> ``(B, heads, queries, slots)``: new tokens see those before them.

    And those behind them that ``block`` lets them see.
    """
    mask = visible.repeat(1, 1, queries, 1)
    if queries > 1:
        order = mask.new_ones((queries, queries)).tril()
        mask[..., -queries:] &= order if block is None else block | order
    return mask
