"""Cache layers whose tokens live in the slots of a shared table. Their memory is allocated once, or grows in chunks."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.table import Table, enlarged
from asymvlm.hf.caches import CacheLayerMixin
from asymvlm.hf.errors import MechanismError


class SlotLayer(CacheLayerMixin):
    """K and V of one full-attention layer: ``(B, G, slots, head_dim)``.

    ``first`` is the layer of its group that takes the slots of a step where no patched model has asked for them before.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, table: Table, first: bool) -> None:
        super().__init__()
        self.table = table
        self.first = first

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.table.static

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, width = key_states.shape
        capacity = self.table.capacity
        # zeros, because a masked slot's value is still multiplied by 0
        self.keys = key_states.new_zeros((rows, heads, capacity, width))
        self.values = value_states.new_zeros((rows, heads, capacity, value_states.shape[-1]))
        if self.is_compileable and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's K and V ``(B, G, queries, head_dim)``; K and V of the slots in use, as views."""
        if self.first:
            if not self.table.open:
                if self.table.announced:
                    raise MechanismError("giving a step its slots", "its first layer ran before the decoder's hook")
                self.table.begin(key_states.shape[0], key_states.shape[2], key_states.device)
            self.table.open = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.keys.shape[2] < self.table.capacity:
            self.keys = enlarged(self.keys, 2, self.table.capacity, 0)
            self.values = enlarged(self.values, 2, self.table.capacity, 0)
        if self.table.heads not in (1, key_states.shape[1]):
            raise NotImplementedError(
                f"eviction by head needs {self.table.heads} K/V heads in every layer, got {key_states.shape[1]}"
            )
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.table.heads == 1:
            return self.table.write(storage, new)
        found = self.table.write(by_line(storage), new.flatten(0, 1)[:, None])
        return found[:, 0].unflatten(0, new.shape[:2])

    def storages(self) -> list[torch.Tensor]:
        """K and V by line of the table: ``(lines, G, slots, head_dim)``, with one head where each has its own line."""
        held = [tensor for tensor in (self.keys, self.values) if tensor is not None]
        return held if self.table.heads == 1 else [by_line(tensor) for tensor in held]

    def get_seq_length(self) -> Any:
        """Columns, evicted ones counted: positions and `generate` go by them."""
        return self.table.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.table.visible_slots(query_length), 0

    def get_max_length(self) -> int:
        return self.table.capacity if self.is_compileable else -1

    def shrink(self) -> None:
        """Give back the memory of slots beyond the table's capacity."""
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[2] > self.table.capacity:
                setattr(self, name, tensor[:, :, : self.table.capacity].clone())

    def pick_rows(self, rows: torch.Tensor) -> None:
        """In place where the number of rows stays, so that a beam step allocates no second cache for good."""
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            if tensor is not None:
                picked = tensor[rows.to(tensor.device)]
                setattr(self, name, tensor.copy_(picked) if len(rows) == len(tensor) else picked)

    def reset(self) -> None:
        for tensor in (self.keys, self.values):
            if tensor is not None:
                tensor.zero_()

    def offload(self) -> None:
        raise NotImplementedError("a cache with text eviction stays on its device: offloading is not supported")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "a cache with text eviction cannot be cropped: its last slots need not be the last tokens"
            )


def by_line(storage: torch.Tensor) -> torch.Tensor:
    """``(B, G, slots, D)`` as ``(B * G, 1, slots, D)``, a view."""
    return storage.view(-1, 1, *storage.shape[2:])
