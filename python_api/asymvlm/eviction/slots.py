"""Which token lies in which slot of the K/V cache: one table for all layers.

The cache has a logical length, the columns the caller knows, and a physical one, the slots in use. A token keeps its
column, and with it its position, wherever its K and V lie. Two tables differ in who counts: `Slots` on the host, for
steps that run eagerly; `StaticSlots` on the device alone, for steps that are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asymvlm.eviction.choose import lowest
from asymvlm.policies import TextEviction
from asymvlm_kernels import move_slots_, plan_moves

FREE, PADDING = -1, -2  # in `slot_pos`; a padding slot is in use and never seen
CHUNK = 128  # slots that a cache of unknown length grows by, at least


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


class Slots(Table):
    """Counts on the host, so nothing synchronises; freed slots are closed by moving tokens from the tail into them."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self.length = 0  # columns
        self.span = 0  # every slot in use is below
        self.generated = 0  # tokens of a row, evicted ones included
        self.live: list[int] = []  # slots in use, by row
        self.held: list[int] = []  # evictable ones among them
        self.evicted: list[int] = []
        self.has_padding = False
        self._queries = 0
        self._start: int | None = None
        self._index: torch.Tensor | None = None
        self.storages: Callable[[], list[torch.Tensor]] = list  # K and V of all layers, (B, G, S, D)

    @property
    def has_holes(self) -> bool:
        return any(live < self.span for live in self.live)

    @property
    def past(self) -> int:
        """Columns before the step."""
        return self.length - self._queries if self.open else self.length

    @property
    def column(self) -> torch.Tensor:
        """``(B,)`` int64: column of the step's last token."""
        return torch.full((self.rows,), self.length - 1, device=self.slot_pos.device)

    @property
    def offset(self) -> int:
        """The slot that a step's first token stands at for a causal mask by slot number."""
        return self.span - self._queries if self.open else max(self.live, default=0)

    def visible_slots(self, queries: int) -> int:
        """Slots that the step reads, whether it has its slots already or not."""
        return self.offset + queries  # at most one hole is open between steps, and the next token fills it

    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None = None) -> None:
        """Give the next ``queries`` columns their slots. ``real`` ``(B, queries)`` bool: which are no padding."""
        if not self.rows:
            self.capacity = max(self.capacity, queries)
            self._make(rows, device)
            self.live, self.held, self.evicted = [0] * rows, [0] * rows, [0] * rows
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
            self.evictable[:, self._start] = generated == 1
        else:
            self._mark(torch.arange(self.length, end, dtype=torch.int32, device=device), real, end - generated)
        self.has_padding |= real is not None
        self.live = [live + queries for live in self.live]
        self.held = [held + generated for held in self.held]
        self.generated += generated
        self.length, self._queries = end, queries
        self.open = True

    def _mark(self, columns: torch.Tensor, real: torch.Tensor | None, first_generated: int) -> None:
        places, made = self._places(columns, real), columns >= first_generated
        if self._index is None:
            self.slot_pos[:, self._start : self.span] = places
            self.evictable[:, self._start : self.span] = made
        else:
            self.slot_pos.scatter_(1, self._index, places)
            self.evictable.scatter_(1, self._index, made.expand(self.rows, -1))

    def grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        self.capacity = max(needed, self.capacity + max(CHUNK, self.capacity // 4))
        if self.rows:
            self.slot_pos = enlarged(self.slot_pos, 1, self.capacity, FREE)
            self.evictable = enlarged(self.evictable, 1, self.capacity, False)

    def write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """K or V of the step, ``(B, G, queries, D)``, into its slots; the slots in use, a view."""
        if self._index is None:
            assert self._start is not None
            storage[:, :, self._start : self._start + new.shape[2]] = new
        else:
            scatter_slots(storage, self._index, new)
        return storage[:, :, : self.span]

    def visible(self) -> torch.Tensor | None:
        """``(B, span)`` bool: slots with a real token; None where that is known to be all of them."""
        return self.slot_pos[:, : self.span] >= 0 if self.has_holes or self.has_padding else None

    def excess(self, policy: TextEviction) -> list[int]:
        """Tokens that are to go from each row now."""
        return [policy.excess(held, self.generated) for held in self.held]

    def evict(self, scores: torch.Tensor, policy: TextEviction) -> None:
        """Free the slots of the lowest scored generated tokens.

        Args:
            scores: ``(B, span)`` fp32.
        """
        excess = self.excess(policy)
        position = self.slot_pos[:, : self.span]
        scores = scores.to(position.device)
        candidates = self.evictable[:, : self.span] & (position < self.length - policy.guard)
        # one number for all rows is no copy to the device
        count = excess[0] if len({*excess}) == 1 else torch.tensor(excess, device=position.device)
        self._free(lowest(scores, candidates, position, count), excess, excess)

    def evict_columns(self, drop: torch.Tensor) -> None:
        """Free the slots of given columns, ``drop`` ``(B, columns)`` bool. Counts them, so it synchronises."""
        freed = self._marked(drop)[:, : self.span]
        held = freed & self.evictable[:, : self.span]
        counts, evictable = torch.stack([freed.sum(1), held.sum(1)]).tolist()
        self._free(freed, counts, evictable)

    def _free(self, drop: torch.Tensor, counts: list[int], evictable: list[int]) -> None:
        """``drop`` ``(B, span)``: ``counts`` slots of each row, ``evictable`` of them generated tokens."""
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
        tensors = [storage.transpose(1, 2) for storage in self.storages()] + [self.slot_pos, self.evictable]
        for device in {tensor.device for tensor in tensors}:  # one, unless the layers are spread over several
            there = [tensor for tensor in tensors if tensor.device == device]
            move_slots_(there, source.to(device), target.to(device))
        behind = torch.arange(self.span, device=keep.device) >= keep.sum(1, keepdim=True)
        self.slot_pos[:, : self.span].masked_fill_(behind, FREE)
        self.evictable[:, : self.span].masked_fill_(behind, False)
        self.span = max(self.live)

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        storages = self.storages
        self.__init__(self.capacity)  # type: ignore[misc]
        self.storages = storages

    def pick_rows(self, rows: torch.Tensor) -> None:
        """Rows by index: beams, repeats, a part of the batch."""
        self.slot_pos, self.evictable = self.slot_pos[rows], self.evictable[rows]
        chosen = [0] * len(rows) if len({*zip(self.live, self.held, self.evicted)}) == 1 else rows.tolist()
        self.live, self.held, self.evicted = (
            [counts[row] for row in chosen] for counts in (self.live, self.held, self.evicted)
        )
        self.rows = len(chosen)

    def counters(self) -> dict[str, Any]:
        return {"logical": self.length, "physical": self.span, "held": self.held, "evicted": self.evicted}


class StaticSlots(Table):
    """All state in tensors of fixed shape, so a compiled step stays one graph; freed slots are written again."""

    length: torch.Tensor  # () int64, columns
    generated: torch.Tensor  # () int64, tokens of a row, evicted ones included
    first_generated: torch.Tensor  # () int64, `prompt_end` as the compiled step sees it
    evicted: torch.Tensor  # (B,) int64

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.remapped = True
        self._index: torch.Tensor
        self._columns: torch.Tensor

    def _make(self, rows: int, device: torch.device) -> None:
        super()._make(rows, device)
        self.length, self.generated, self.first_generated = torch.zeros((3,), dtype=torch.int64, device=device).unbind()
        self.evicted = torch.zeros((rows,), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            for tensor in self.tensors():
                torch._dynamo.mark_static_address(tensor)  # as transformers does: in-place updates, one CUDA graph

    def tensors(self) -> list[torch.Tensor]:
        if not self.rows:
            return []
        return [*super().tensors(), self.length, self.generated, self.first_generated, self.evicted]

    @property
    def past(self) -> Any:
        if not self.rows:
            return 0
        return self._columns[0] if self.open else self.length

    @property
    def column(self) -> torch.Tensor:
        return self._columns[-1:].expand(self.rows)

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
        self.slot_pos.scatter_(1, index, self._places(columns, real))
        self.evictable.scatter_(1, index, made.expand(rows, -1))
        self.generated.add_(made.sum())
        self.length.add_(queries)
        self._index, self._columns = index, columns
        self.open = True

    def write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        scatter_slots(storage, self._index, new)
        return storage

    def visible(self) -> torch.Tensor:
        """``(B, queries, S)`` bool: the slots that each token of the step sees."""
        position = self.slot_pos[:, None]
        return (position >= 0) & (position <= self._columns[:, None])

    def evict(self, scores: torch.Tensor, policy: TextEviction) -> None:
        scores = scores.to(self.slot_pos.device)
        excess = policy.excess(self.evictable.sum(1), self.generated)
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
            for tensor in (self.evictable, self.length, self.generated, self.evicted):
                tensor.zero_()
        self.prompt_end = self.prompt_mask = None
        self.open = False

    def pick_rows(self, rows: torch.Tensor) -> None:
        for tensor in (self.slot_pos, self.evictable, self.evicted):
            tensor.copy_(tensor[rows])

    def counters(self) -> dict[str, Any]:
        if not self.rows:
            return {"logical": 0, "physical": 0, "held": [], "evicted": []}
        used = (self.slot_pos != FREE).sum(1)
        return {
            "logical": int(self.length),
            "physical": int(used.max()),
            "held": self.evictable.sum(1).tolist(),
            "evicted": self.evicted.tolist(),
        }


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
