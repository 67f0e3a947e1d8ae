"""Protected tokens move up to the window: their keys are rotated as if nothing had been between.

StreamingLLM numbers tokens by their place in the cache. Attention depends on distances alone, and those inside the
window stay; so it is enough to move the tokens in front of the gap, and queries keep the positions of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asymvlm.cache.anchors import Anchors
from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.layers import SlotLayer
from asymvlm.cache.limited import LimitedTable
from asymvlm.hf.rotary import KeyRotation

LOW, HIGH = "lowest position", "highest position"  # rows of state; they differ for image tokens under M-RoPE


class Reindexing:
    """Of one decoder; arguments and errors as of `KeyRotation`."""

    def __init__(self, decoder: nn.Module, attention: nn.Module, config: Any) -> None:
        self._rotate = KeyRotation(decoder, attention, config)

    def note(self, cache: EvictionCache, positions: torch.Tensor | None, queries: int, device: torch.device) -> None:
        """Where the tokens of a step stand, once they have their slots. ``positions`` as of the decoder."""
        table = cache.table
        assert isinstance(table, LimitedTable)
        if table.noted != table.past:
            raise ValueError(
                f"re-indexed positions are noted from the first token on: {table.past - table.noted} of the cache's "
                f"{table.past} tokens came without"
            )
        table.noted = table.length
        if positions is None:
            positions = torch.arange(table.length - queries, table.length, device=device)[None]
        if positions.ndim == 3:
            positions = positions[-3:]  # behind those of text, where a family has them
        else:
            positions = positions[None]
        positions = positions.float().expand(-1, table.rows, -1)
        table.set_slot_state(LOW, positions.amin(0))
        table.set_slot_state(HIGH, positions.amax(0))

    def move_up(self, cache: EvictionCache) -> None:
        """Behind an eviction: the tokens that never go, right in front of the first one behind the gap."""
        table = cache.table
        assert isinstance(table, LimitedTable)
        slot_pos = table.slots_in_use()
        stays = (slot_pos >= 0) & ~table.evictable[:, : table.span]
        if cache.anchors is None:
            if table.sinks == 0:
                return
            cache.anchors = Anchors.of(table, _layers(cache), stays)
        window = (slot_pos >= 0) & ~stays
        begin = table.slot_state(LOW).masked_fill(~window, torch.inf).amin(1)
        end = table.slot_state(HIGH).masked_fill(~stays, -torch.inf).amax(1)
        gone = torch.tensor([count > 0 for count in table.evicted], device=begin.device)
        shift = torch.where(gone & begin.isfinite(), (begin - end - 1).clamp_min(0), 0.0)
        slots = cache.anchors.slots(slot_pos)
        for number, layer in _layers(cache).items():
            cache.anchors.write(layer, slots, self._rotate(cache.anchors.keys[number], shift))


def _layers(cache: EvictionCache) -> dict[int, SlotLayer]:
    return {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, SlotLayer)}
