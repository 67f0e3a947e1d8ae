"""Which token lies in which slot of the K/V cache: one table for all layers.

The cache has a logical length, the columns the caller knows, and a physical one, the slots in use. A token keeps its
column, and with it its position, wherever its K and V lie. Two tables differ in who counts: `Slots` on the host, for
steps that run eagerly; `StaticSlots` on the device alone, for steps that are compiled once.
"""

from __future__ import annotations

import torch

FREE, PADDING = -1, -2  # in `slot_pos`; a padding slot is in use and never seen


class Table:
    """What both tables share. Axes: B rows, S slots.

    ``slot_pos`` ``(B, S)`` int32 is the column of the token in each slot, `FREE` or `PADDING`; ``evictable`` ``(B, S)``
    bool marks generated tokens. ``prompt_end`` is the first column of generated tokens where the caller knows it; else
    single tokens after the first step are taken for generated ones.
    """

    slot_pos: torch.Tensor
    evictable: torch.Tensor

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity or 0
        self.rows = 0  # 0 until the first step
        self.prompt_end: int | None = None
        self.prompt_mask: torch.Tensor | None = None  # (B, columns) bool, for steps whose mask does not tell padding
        self.announced = False  # a patched model's `generate` runs, whose hook gives each step its slots
        self.open = False  # a step has its slots, and its first layer has not written yet
        self.remapped = False  # a slot's number need not be its column any more

    def _make(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.slot_pos = torch.full((rows, self.capacity), FREE, dtype=torch.int32, device=device)
        self.evictable = torch.zeros((rows, self.capacity), dtype=torch.bool, device=device)

    def tensors(self) -> list[torch.Tensor]:
        return [self.slot_pos, self.evictable] if self.rows else []

    def _places(self, columns: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        columns = columns.to(torch.int32).expand(self.rows, -1)
        return columns if real is None else columns.masked_fill(~real, PADDING)

    def hide(self, mask: torch.Tensor) -> None:
        """Tokens that the caller now masks are padding from here on. ``mask`` ``(B, columns)`` bool."""
        known = torch.ones_like(mask)
        self.slot_pos.masked_fill_(self._marked(known) & ~self._marked(mask), PADDING)

    def _marked(self, columns: torch.Tensor) -> torch.Tensor:
        """``(B, S)`` bool: slots whose token is in a marked column, ``(B, columns)`` bool."""
        column = self.slot_pos.long()
        inside = (column >= 0) & (column < columns.shape[1])
        return inside & columns.gather(1, column.clamp(0, columns.shape[1] - 1))

    def alive(self, start: int, width: int) -> torch.Tensor:
        """``(B, width)`` bool: which of the columns from ``start`` on are still held."""
        column = self.slot_pos.long() - start
        inside = (self.slot_pos >= 0) & (column >= 0) & (column < width)
        alive = torch.zeros((self.rows, width + 1), dtype=torch.bool, device=column.device)
        return alive.scatter_(1, column.masked_fill(~inside, width), True)[:, :width]


def scatter_slots(storage: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> None:
    """``storage[b, :, index[b, i]] = new[b, :, i]`` for ``(B, G, S, D)`` and ``(B, G, n, D)``, in place."""
    index = index.to(storage.device)[:, None, :, None]
    storage.scatter_(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new)


def enlarged(tensor: torch.Tensor, dim: int, size: int, fill: float) -> torch.Tensor:
    """A copy with ``size`` entries along ``dim``, new ones filled."""
    shape = list(tensor.shape)
    shape[dim] = size
    result = tensor.new_full(shape, fill)
    result.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return result
