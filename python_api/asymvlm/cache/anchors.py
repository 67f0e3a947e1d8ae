"""Keys of protected tokens as they were before they moved, so that errors of many rotations do not add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm.cache.layers import SlotLayer
from asymvlm.cache.table import Table


@dataclass(eq=False)
class Anchors:
    """On an `EvictionCache`. ``columns`` ``(B, n)`` int64, the last repeated where a row has fewer than n.

    ``keys`` of each layer by number, ``(B, G, n, D)`` fp32.
    """

    columns: torch.Tensor
    keys: dict[int, torch.Tensor]

    @classmethod
    def of(cls, table: Table, layers: dict[int, SlotLayer], protected: torch.Tensor) -> Anchors:
        """Of the ``protected`` slots, ``(B, slots)`` bool: at least one in each row. Copies a count to the host."""
        slot_pos = table.slots_in_use().long()
        counts = protected.sum(1, keepdim=True)
        columns = slot_pos.masked_fill(~protected, 2**40).sort(1).values[:, : int(counts.max())]
        last = columns.gather(1, (counts - 1).clamp_min(0))
        columns = torch.where(columns < 2**40, columns, last)
        anchors = cls(columns, {})
        slots = anchors.slots(slot_pos)
        anchors.keys = {number: _gather(layer, slots).float() for number, layer in layers.items()}
        return anchors

    def slots(self, slot_pos: torch.Tensor) -> torch.Tensor:
        """``(B, n)`` int64: where the tokens lie now."""
        by_column, order = slot_pos.long().sort(1)
        return order.gather(1, torch.searchsorted(by_column, self.columns))

    def write(self, layer: SlotLayer, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Keys ``(B, G, n, D)`` into the slots of a layer. Equal slots get equal keys."""
        assert layer.keys is not None
        layer.keys.scatter_(2, _wide(slots, layer.keys), keys.to(layer.keys.dtype))

    def pick_rows(self, rows: torch.Tensor) -> None:
        self.columns = self.columns[rows.to(self.columns.device)]
        self.keys = {number: keys[rows.to(keys.device)] for number, keys in self.keys.items()}

    def tensors(self) -> list[torch.Tensor]:
        return [self.columns, *self.keys.values()]


def _wide(slots: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return slots.to(keys.device)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])


def _gather(layer: SlotLayer, slots: torch.Tensor) -> torch.Tensor:
    assert layer.keys is not None
    return layer.keys.gather(2, _wide(slots, layer.keys))
