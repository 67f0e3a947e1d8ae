"""Which token lies in which slot of the K/V cache: one table for a group of layers that hold the same tokens.

The cache has a logical length, the columns the caller knows, and a physical one, the slots in use. A token keeps its
column, and with it its position, wherever its K and V lie. Two tables differ in who counts: `GrowingTable` on the host,
for steps that run eagerly; `FixedTable` on the device alone, for steps that are compiled once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from asymvlm.settings.eviction import TextEviction

FREE, PADDING = -1, -2  # in `slot_pos`; a padding slot is in use and never seen
SUMS = "attention"  # the row of state that attention is added up in


class Table(ABC):
    """What both tables share. Axes: S slots, and one line for each row, or for each head of each row.

    ``slot_pos`` ``(lines, S)`` int32 is the column of the token in each slot, `FREE` or `PADDING`; ``evictable``
    ``(lines, S)`` bool marks tokens that may go. ``prompt_end`` is the first column of generated tokens where the
    caller knows it; else single tokens after the first step are taken for generated ones.

    A step goes: `begin` gives its tokens their slots, each layer of the group calls `write` twice, attention reads what
    is `visible`, and `evict` frees slots.

    Args:
        capacity: slots to allocate. heads: K/V heads that hold other tokens than each other; 1 where all hold the same.
    """

    static: ClassVar[bool]  # fixed shapes, nothing on the host
    slot_pos: torch.Tensor
    evictable: torch.Tensor
    generated: Any  # tokens of a row, evicted ones included: a number, or a () int64 tensor
    generating: Any  # whether the step's last token is a generated one: a bool, or a () bool tensor

    def __init__(self, capacity: int | None, heads: int = 1) -> None:
        self.capacity = capacity or 0
        self.heads = heads
        self.layer = 0  # number of the first layer of its group
        self.rows = 0  # of the batch; 0 until the first step
        self.sinks: int | None = None  # tokens of the prompt that stay, the first ones; None: all of it
        self.storages: Callable[[], list[torch.Tensor]] = list  # K and V of the group's layers, (lines, G, S, D)
        self.prompt_end: int | None = None
        self.prompt_mask: torch.Tensor | None = None  # (B, columns) bool, for steps whose mask does not tell padding
        self.announced = False  # a patched model's `generate` runs, whose hook gives each step its slots
        self.open = False  # a step has its slots, and its first layer has not written yet
        self.remapped = False  # a slot's number need not be its column any more

    def _make(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.slot_pos = torch.full((self.lines, self.capacity), FREE, dtype=torch.int32, device=device)
        self.evictable = torch.zeros((self.lines, self.capacity), dtype=torch.bool, device=device)

    @property
    def lines(self) -> int:
        return self.rows * self.heads

    def by_line(self, rows: torch.Tensor) -> torch.Tensor:
        """What is known of each row, for each of its lines."""
        return rows if self.heads == 1 else rows.repeat_interleave(self.heads, 0)

    def lines_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The lines of the rows with these numbers."""
        return (rows[:, None] * self.heads + torch.arange(self.heads, device=rows.device)).flatten()

    @property
    @abstractmethod
    def past(self) -> Any:
        """Columns before the step."""

    @property
    @abstractmethod
    def offset(self) -> Any:
        """The slot that a step's first token stands at for a causal mask by slot number."""

    @property
    @abstractmethod
    def column(self) -> torch.Tensor:
        """``(lines,)`` int64: column of the step's last token."""

    @abstractmethod
    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None = None) -> None:
        """Give the next ``queries`` columns their slots. ``real`` ``(B, queries)`` bool: which are no padding."""

    @abstractmethod
    def write(self, storage: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """K or V of the step, ``(lines, G, queries, D)``, into its slots; the slots to attend to, a view."""

    @abstractmethod
    def visible(self) -> torch.Tensor | None:
        """``(lines, 1 or queries, slots)`` bool: what a step may see, apart from the order of its own tokens.

        None where that is known to be all of them.
        """

    @abstractmethod
    def visible_slots(self, queries: int) -> int:
        """Slots that the step reads, whether it has its slots already or not."""

    @abstractmethod
    def mask_columns(self, queries: int) -> int | None:
        """Columns that a 2-D mask of a step must have; None where only a device knows."""

    @abstractmethod
    def wants_scores(self, policy: TextEviction) -> bool:
        """Whether a step must score, because tokens may be due to go."""

    @abstractmethod
    def slots_in_use(self) -> torch.Tensor:
        """``slot_pos`` as far as a step reads it, contiguous."""

    @abstractmethod
    def slot_state(self, name: str) -> torch.Tensor:
        """A row of state as far as a step reads it, ``(lines, slots in use)`` fp32: a view to write to.

        It is 0 for a new token and moves with the token's slot.
        """

    @abstractmethod
    def add_up(self, attention: torch.Tensor) -> torch.Tensor:
        """Add a step's attention ``(lines, slots in use)`` to the sums where its token is a generated one; the sums."""

    @abstractmethod
    def evict(self, scores: torch.Tensor, policy: TextEviction) -> None:
        """Free the slots of the lowest scored tokens that may go. ``scores`` ``(lines, slots in use)`` fp32."""

    @abstractmethod
    def evict_columns(self, drop: torch.Tensor) -> None:
        """Free the slots of given columns, ``drop`` ``(B, columns)`` bool."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every token; the memory stays."""

    @abstractmethod
    def pick_rows(self, rows: torch.Tensor) -> None:
        """Rows by index: beams, repeats, a part of the batch."""

    @abstractmethod
    def counters(self) -> dict[str, Any]:
        """``logical`` and ``physical`` length, and by row the most ``held`` and ``evicted`` tokens of its heads."""

    def forget_call(self) -> None:
        """Forget what only the call of `generate` that is over had said about its prompt."""
        self.prompt_end = self.prompt_mask = None
        self.announced = False

    def _may_go(self, columns: torch.Tensor, made: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """Which of a step's columns may be evicted: those ``made`` by `generate`, and of a prompt what its sinks leave.

        ``(queries,)``, or ``(lines, queries)`` where rows differ.
        """
        if self.sinks is None:
            return made
        if real is None:
            return made | (columns >= self.sinks)
        number = real.long().cumsum(1) + columns[0] * (columns[0] > 0) - 1  # padding of earlier steps counts
        return self.by_line(made | (real & (number >= self.sinks)))

    def tensors(self) -> list[torch.Tensor]:
        return [self.slot_pos, self.evictable] if self.rows else []

    def _places(self, columns: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        columns = columns.to(torch.int32).expand(self.lines, -1)
        return columns if real is None else columns.masked_fill(~self.by_line(real), PADDING)

    def hide(self, mask: torch.Tensor) -> None:
        """Tokens that the caller now masks are padding from here on. ``mask`` ``(B, columns)`` bool."""
        known = torch.ones_like(mask)
        self.slot_pos.masked_fill_(self._marked(known) & ~self._marked(mask), PADDING)

    def _marked(self, columns: torch.Tensor) -> torch.Tensor:
        """``(lines, S)`` bool: slots whose token is in a marked column, ``(B, columns)`` bool."""
        columns, column = self.by_line(columns), self.slot_pos.long()
        inside = (column >= 0) & (column < columns.shape[1])
        return inside & columns.gather(1, column.clamp(0, columns.shape[1] - 1))

    def tokens_by_line(self) -> list[int]:
        """Tokens held by each line, padding left out. Copies the counts to the host."""
        found: list[int] = (self.slot_pos >= 0).sum(1).tolist() if self.rows else []
        return found

    def alive(self, start: int, width: int) -> torch.Tensor:
        """``(B, width)`` bool: which of the columns from ``start`` on are still held, by a head at least."""
        alive = self.alive_by_line(start, width)
        return alive if self.heads == 1 else alive.view(self.rows, self.heads, width).any(1)

    def alive_by_line(self, start: int, width: int) -> torch.Tensor:
        """``(lines, width)`` bool: as `alive`, of each line."""
        column = self.slot_pos.long() - start
        inside = (self.slot_pos >= 0) & (column >= 0) & (column < width)
        alive = torch.zeros((self.lines, width + 1), dtype=torch.bool, device=column.device)
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
