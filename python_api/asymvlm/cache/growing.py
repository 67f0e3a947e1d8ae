"""The slot table of a cache that grows: its counts are on the host."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.choose import lowest
from asymvlm.cache.table import FREE, SUMS, Table, enlarged, scatter_slots
from asymvlm.settings.eviction import TextEviction
from asymvlm_kernels import move_slots_, plan_moves

CHUNK = 128  # slots that a cache of unknown length grows by, at least


class GrowingTable(Table):
    """Counts on the host, so nothing synchronises; freed slots are closed by moving tokens from the tail into them.

    ``state`` are named ``(lines, capacity)`` fp32 rows, made when they are first asked for.
    """

    static = False

    def __init__(self, capacity: int | None = None, heads: int = 1) -> None:
        super().__init__(capacity, heads)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.rows, self.open, self.remapped = 0, False, False
        self.length = 0  # columns
        self.span = 0  # every slot in use is below
        self.generated = 0  # tokens of a row, evicted ones included
        self.live: list[int] = []  # slots in use, by line
        self.held: list[int] = []  # generated tokens less those evicted
        self.evicted: list[int] = []
        self.generating = False
        self.has_padding = False
        self.state: dict[str, torch.Tensor] = {}
        self._queries = 0
        self._start: int | None = None
        self._index: torch.Tensor | None = None

    @property
    def has_holes(self) -> bool:
        return any(live < self.span for live in self.live)

    @property
    def past(self) -> int:
        return self.length - self._queries if self.open else self.length

    @property
    def column(self) -> torch.Tensor:
        return torch.full((self.lines,), self.length - 1, device=self.slot_pos.device)

    @property
    def offset(self) -> int:
        return self.span - self._queries if self.open else max(self.live, default=0)

    def visible_slots(self, queries: int) -> int:
        return self.offset + queries  # at most one hole is open between steps, and the next token fills it

    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None = None) -> None:
        if not self.rows:
            self.capacity = max(self.capacity, queries)
            self._make(rows, device)
            self.live, self.held, self.evicted = ([0] * self.lines for _ in range(3))
        elif rows != self.rows:
            raise ValueError(f"the cache holds {self.rows} rows, got a step of {rows}")
        if queries > 1 and self.has_holes:
            self.compact()
        end, generated = self.length + queries, 0
        if self.prompt_end is not None:
            generated = end - max(self.length, min(self.prompt_end, end))
        elif self.length and queries == 1:
            generated = 1
        self._start = self._index = None
        if queries == 1 and self.has_holes:
            self.span = max(self.span, max(self.live) + 1)
            self.grow(self.span)
            free = self.slot_pos[:, : self.span] == FREE
            self._index = free.to(torch.int8).argmax(1, keepdim=True)
        else:
            self._start, self.span = self.span, self.span + queries
            self.grow(self.span)
        if queries == 1 and real is None and self._index is None:  # the common step: two launches
            self.slot_pos[:, self._start] = self.length
            self.evictable[:, self._start] = generated == 1 or (self.sinks is not None and self.length >= self.sinks)
        else:
            self._mark(torch.arange(self.length, end, dtype=torch.int32, device=device), real, end - generated)
        self.has_padding |= real is not None
        self.live = [live + queries for live in self.live]
        self.held = [held + generated for held in self.held]
        self.generated += generated
        self.generating = generated > 0
        self.length, self._queries = end, queries
        self.open = True
        for name in self.state:
            self.set_slot_state(name, torch.zeros((rows, queries), device=device))

    def slot_state(self, name: str) -> torch.Tensor:
        if name not in self.state:
            self.state[name] = torch.zeros((self.lines, self.capacity), device=self.slot_pos.device)
        return self.state[name][:, : self.span]

    def set_slot_state(self, name: str, values: torch.Tensor) -> None:
        """A row of state for the tokens of the step, ``(B, queries)``."""
        row, values = self.slot_state(name), self.by_line(values.to(self.slot_pos.device, torch.float32))
        if self._index is None:
            row[:, self._start :] = values
        else:
            row.scatter_(1, self._index, values)

    def _mark(self, columns: torch.Tensor, real: torch.Tensor | None, first_generated: int) -> None:
        places, made = self._places(columns, real), self._may_go(columns, columns >= first_generated, real)
        if self._index is None:
            self.slot_pos[:, self._start : self.span] = places
            self.evictable[:, self._start : self.span] = made
        else:
            self.slot_pos.scatter_(1, self._index, places)
            self.evictable.scatter_(1, self._index, made.expand(self.lines, -1))

    def grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        self.capacity = max(needed, self.capacity + max(CHUNK, self.capacity // 4))
        if self.rows:
            self._enlarge()

    def add_up(self, attention: torch.Tensor) -> torch.Tensor:
        sums = self.slot_state(SUMS)
        return sums.add_(attention.to(sums.device)) if self.generating else sums

    def _enlarge(self) -> None:
        self.slot_pos = enlarged(self.slot_pos, 1, self.capacity, FREE)
        self.evictable = enlarged(self.evictable, 1, self.capacity, False)
        self.state = {name: enlarged(row, 1, self.capacity, 0.0) for name, row in self.state.items()}

    def _by_slot(self) -> list[torch.Tensor]:
        """What is known of each slot, ``(lines, capacity)`` each: it moves with the slot's token."""
        return [self.slot_pos, self.evictable, *self.state.values()]

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self.state.values()]

    def write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self._index is None:
            assert self._start is not None
            storage[:, :, self._start : self._start + new.shape[2]] = new
        else:
            scatter_slots(storage, self._index, new)
        return storage[:, :, : self.span]

    def visible(self) -> torch.Tensor | None:
        return self.slot_pos[:, None, : self.span] >= 0 if self.has_holes or self.has_padding else None

    def mask_columns(self, queries: int) -> int:
        return self.length + queries

    def wants_scores(self, policy: TextEviction) -> bool:
        return any(self.excess(policy))

    def slots_in_use(self) -> torch.Tensor:
        return self.slot_pos[:, : self.span].contiguous()

    def excess(self, policy: TextEviction) -> list[int]:
        """Tokens that are to go from each line now."""
        return [policy.excess(held, self.generated) for held in self.held]

    def evict(self, scores: torch.Tensor, policy: TextEviction) -> None:
        excess = self.excess(policy)
        position = self.slot_pos[:, : self.span]
        scores = scores.to(position.device)
        candidates = self.evictable[:, : self.span] & (position < self.length - policy.guard)
        # one number for all rows is no copy to the device
        count = excess[0] if len({*excess}) == 1 else torch.tensor(excess, device=position.device)
        self._free(lowest(scores, candidates, position, count), excess, excess)

    def evict_columns(self, drop: torch.Tensor) -> None:
        # counts them, so it synchronises
        freed = self._marked(drop)[:, : self.span]
        held = freed & self.evictable[:, : self.span]
        counts, evictable = torch.stack([freed.sum(1), held.sum(1)]).tolist()
        self._free(freed, counts, evictable)

    def _free(self, drop: torch.Tensor, counts: list[int], evictable: list[int]) -> None:
        """``drop`` ``(lines, span)``: ``counts`` slots of each line, ``evictable`` of them of tokens that may go."""
        self.slot_pos[:, : self.span].masked_fill_(drop, FREE)
        self.evictable[:, : self.span].masked_fill_(drop, False)
        self.live = [live - count for live, count in zip(self.live, counts)]
        self.held = [held - count for held, count in zip(self.held, evictable)]
        self.evicted = [evicted + count for evicted, count in zip(self.evicted, counts)]
        self.remapped = True
        if max(counts) > 1:  # a single hole is filled by the next token, without a copy
            self.compact()

    def compact(self) -> None:
        """Move tokens from the tail into the holes, in all layers at once, so that steps read fewer slots."""
        keep = self.slot_pos[:, : self.span] != FREE
        most = min(self.span // 2, max(self.span - live for live in self.live))
        source, target = plan_moves(keep, capacity=most)
        tensors = [storage.transpose(1, 2) for storage in self.storages()] + self._by_slot()
        for device in {tensor.device for tensor in tensors}:  # one, unless the layers are spread over several
            there = [tensor for tensor in tensors if tensor.device == device]
            move_slots_(there, source.to(device), target.to(device))
        behind = torch.arange(self.span, device=keep.device) >= keep.sum(1, keepdim=True)
        self.slot_pos[:, : self.span].masked_fill_(behind, FREE)
        self.evictable[:, : self.span].masked_fill_(behind, False)
        self.span = max(self.live)

    def reset(self) -> None:
        self.forget_call()
        self._begin_anew()

    def pick_rows(self, rows: torch.Tensor) -> None:
        lines = self.lines_of(rows)
        self.slot_pos, self.evictable = self.slot_pos[lines], self.evictable[lines]
        self.state = {name: row[lines] for name, row in self.state.items()}
        chosen = [0] * len(lines) if len({*zip(self.live, self.held, self.evicted)}) == 1 else lines.tolist()
        self.live, self.held, self.evicted = (
            [counts[row] for row in chosen] for counts in (self.live, self.held, self.evicted)
        )
        self.rows = len(rows)

    def counters(self) -> dict[str, Any]:
        held, evicted = (
            [max(counts[line : line + self.heads]) for line in range(0, self.lines, self.heads)]
            for counts in (self.held, self.evicted)
        )
        return {"logical": self.length, "physical": self.span, "held": held, "evicted": evicted}
