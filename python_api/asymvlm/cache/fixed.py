"""The slot table of a static cache: all counts are on the device."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.choose import lowest
from asymvlm.cache.table import FREE, SUMS, Table, scatter_slots
from asymvlm.settings.eviction import TextEviction


class FixedTable(Table):
    """All state in tensors of fixed shape, so a compiled step stays one graph; freed slots are written again."""

    length: torch.Tensor  # () int64, columns
    generated: torch.Tensor  # () int64, tokens of a row, evicted ones included
    first_generated: torch.Tensor  # () int64, `prompt_end` as the compiled step sees it
    evicted: torch.Tensor  # (lines,) int64
    sums: torch.Tensor  # (lines, capacity) fp32, the one row of state
    static = True

    def __init__(self, capacity: int, heads: int = 1) -> None:
        super().__init__(capacity, heads)
        self.remapped = True
        self._index: torch.Tensor
        self._columns: torch.Tensor

    def _make(self, rows: int, device: torch.device) -> None:
        super()._make(rows, device)
        self.length, self.generated, self.first_generated = torch.zeros((3,), dtype=torch.int64, device=device).unbind()
        self.evicted = torch.zeros((self.lines,), dtype=torch.int64, device=device)
        self.sums = torch.zeros((self.lines, self.capacity), device=device)
        if not torch.compiler.is_compiling():
            for tensor in self.tensors():
                torch._dynamo.mark_static_address(tensor)  # as transformers does: in-place updates, one CUDA graph

    def tensors(self) -> list[torch.Tensor]:
        if not self.rows:
            return []
        return [*super().tensors(), self.length, self.generated, self.first_generated, self.evicted, self.sums]

    @property
    def past(self) -> Any:
        if not self.rows:
            return 0
        return self._columns[0] if self.open else self.length

    @property
    def column(self) -> torch.Tensor:
        return self._columns[-1:].expand(self.lines)

    @property
    def offset(self) -> Any:
        past = self.past  # inside the slots even when more tokens were seen: the mask itself is made from the table
        return past.clamp_max(self.capacity - 1) if isinstance(past, torch.Tensor) else past

    def visible_slots(self, queries: int) -> int:
        return self.capacity

    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None = None) -> None:
        first = not self.rows
        if first:
            self._make(rows, device)
        elif rows != self.rows:
            raise ValueError(f"the cache holds {self.rows} rows, got a step of {rows}")
        if self.prompt_end is not None:
            self.first_generated.fill_(self.prompt_end)
        elif first or queries > 1:
            self.first_generated.copy_(self.length + queries)
        free = self.slot_pos == FREE
        if queries == 1:
            slot = free.to(torch.int8).argmax(1, keepdim=True)
            index = torch.where(free.any(1, keepdim=True), slot, self.capacity)  # out of bounds: an error, no overwrite
        else:
            index = (~free).to(torch.int8).argsort(dim=1, stable=True)[:, :queries]
        columns = self.length + torch.arange(queries, device=device)
        made = columns >= self.first_generated
        may_go = self._may_go(columns, made, real)
        self.slot_pos.scatter_(1, index, self._places(columns, real))
        self.evictable.scatter_(1, index, may_go.expand(self.lines, -1))
        self.sums.scatter_(1, index, 0.0)
        self.generated.add_(made.sum())
        self.length.add_(queries)
        self._index, self._columns = index, columns
        self.generating = made[-1]
        self.open = True

    def write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        scatter_slots(storage, self._index, new)
        return storage

    def visible(self) -> torch.Tensor:
        position = self.slot_pos[:, None]
        return (position >= 0) & (position <= self._columns[:, None])

    def mask_columns(self, queries: int) -> None:
        return None

    def wants_scores(self, policy: TextEviction) -> bool:
        return True  # the count is on the device: every step scores

    def slots_in_use(self) -> torch.Tensor:
        return self.slot_pos

    def slot_state(self, name: str) -> torch.Tensor:
        assert name == SUMS
        return self.sums

    def add_up(self, attention: torch.Tensor) -> torch.Tensor:
        return self.sums.add_(attention.to(self.sums.device) * self.generating)

    def evict(self, scores: torch.Tensor, policy: TextEviction) -> None:
        scores = scores.to(self.slot_pos.device)
        held = self.evictable.sum(1) if self.sinks is None else self.generated - self.evicted
        excess = policy.excess(held, self.generated)
        candidates = self.evictable & (self.slot_pos < self.length - policy.guard)
        drop = lowest(scores, candidates, self.slot_pos, excess)
        self.slot_pos.masked_fill_(drop, FREE)
        self.evictable.masked_fill_(drop, False)
        self.evicted.add_(excess)

    def evict_columns(self, drop: torch.Tensor) -> None:
        freed = self._marked(drop)
        self.slot_pos.masked_fill_(freed, FREE)
        self.evictable.masked_fill_(freed, False)
        self.evicted.add_(freed.sum(1))

    def reset(self) -> None:
        if self.rows:
            self.slot_pos.fill_(FREE)
            for tensor in (self.evictable, self.length, self.generated, self.evicted, self.sums):
                tensor.zero_()
        self.prompt_end = self.prompt_mask = None
        self.open = False

    def pick_rows(self, rows: torch.Tensor) -> None:
        lines = self.lines_of(rows)
        for tensor in (self.slot_pos, self.evictable, self.evicted, self.sums):
            tensor.copy_(tensor[lines])

    def counters(self) -> dict[str, Any]:
        if not self.rows:
            return {"logical": 0, "physical": 0, "held": [], "evicted": []}
        used = (self.slot_pos != FREE).sum(1)
        return {
            "logical": int(self.length),
            "physical": int(used.max()),
            "held": self._by_row(self.evictable.sum(1) if self.sinks is None else self.generated - self.evicted),
            "evicted": self._by_row(self.evicted),
        }

    def _by_row(self, counts: torch.Tensor) -> list[int]:
        return counts.view(self.rows, self.heads).amax(1).tolist()
