"""The slot table of a cache with a limit: it counts the tokens of each line."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.cache.choose import lowest
from asymvlm.cache.growing import GrowingTable
from asymvlm.cache.table import PADDING


class LimitedTable(GrowingTable):
    """A `GrowingTable` for `CacheLimit`: lines hold different numbers of tokens, by limits of their own.

    Host counts by line: ``tokens`` held and ``prompt`` tokens seen, both without padding; ``limits`` (None: no limit)
    and ``recent``, the newest tokens that stay.
    """

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self.tokens: list[int] = []
        self.prompt: list[int] = []
        self.limits: list[int | None] = []
        self.recent: list[int] = []
        self.weights: torch.Tensor | None = None  # (B, 2): large attention weights of a prompt, and all
        self.noted = 0  # columns whose positions are in the state
        self._made: list[range] = []  # columns of generated tokens

    def begin(self, rows: int, queries: int, device: torch.device, real: torch.Tensor | None = None) -> None:
        fresh, first, generated = not self.rows, self.length, self.generated
        if self.announced and self.prompt_end is not None and first >= self.prompt_end:
            real = None  # `generate` feeds no padding behind its prompt
        super().begin(rows, queries, device, real)
        if fresh:
            self.tokens, self.prompt = [0] * self.lines, [0] * self.lines
            self.limits, self.recent = [None] * self.lines, [0] * self.lines
        made = self.generated - generated
        counts = [queries] * rows if real is None else real.sum(1).tolist()
        new = [count for count in counts for _ in range(self.heads)]
        self.tokens = [held + count for held, count in zip(self.tokens, new)]
        if made:
            self._note_made(first + queries - made, first + queries)
        self.prompt = [seen + max(count - made, 0) for seen, count in zip(self.prompt, new)]

    def _note_made(self, start: int, stop: int) -> None:
        if self._made and self._made[-1].stop == start:
            start = self._made.pop().start
        self._made.append(range(start, stop))

    def _may_go(self, columns: torch.Tensor, made: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        if self.sinks is None:
            return made
        seen = torch.tensor(self.prompt or [0] * self.lines, device=columns.device)[:, None]
        own = torch.ones_like(columns).expand(self.rows, -1) if real is None else real.long()
        first = seen + self.by_line(own.cumsum(1)) <= self.sinks  # among the prompt's first tokens
        return made | (self.by_line(own > 0) & ~first)

    def over(self) -> list[int]:
        """Tokens that each line holds beyond its limit. With the prompt protected only generated ones count."""
        protected = self.prompt if self.sinks is None else [0] * self.lines
        return [
            0 if limit is None else max(held - kept - limit, 0)
            for held, kept, limit in zip(self.tokens, protected, self.limits)
        ]

    def drop(self, scores: torch.Tensor) -> None:
        """Free the slots of the lowest scored tokens beyond the limits, and where it copies anyway, of padding.

        ``scores`` ``(lines, slots in use)`` fp32; of equal ones the oldest go.
        """
        over, position = self.over(), self.slot_pos[:, : self.span]
        device = position.device
        candidates = self.evictable[:, : self.span] & (position >= 0)
        if any(self.recent):
            candidates &= position < self._newest(position)
        count = over[0] if len({*over}) == 1 else torch.tensor(over, device=device)
        freed = lowest(scores.to(device), candidates, position, count)
        padding = [live - held for live, held in zip(self.live, self.tokens)]
        if max(over) > 1 and any(padding):
            freed |= position == PADDING
            self.has_padding = False
        else:
            padding = [0] * self.lines
        self.tokens = [held - count for held, count in zip(self.tokens, over)]
        self.evicted = [gone - pads for gone, pads in zip(self.evicted, padding)]
        self._free(freed, [count + pads for count, pads in zip(over, padding)], over)

    def _newest(self, position: torch.Tensor) -> torch.Tensor:
        """``(lines, 1)``: the column from which on tokens are the newest of their line, and stay."""
        ordered = position.sort(1, descending=True).values  # padding and free slots come last
        if len({*self.recent}) == 1:  # one number for all is no copy to the device
            last = min(self.recent[0], self.span) - 1
            return ordered[:, last : last + 1]
        recent = torch.tensor(self.recent, device=position.device).clamp_max(self.span)[:, None]
        bound = ordered.gather(1, (recent - 1).clamp_min(0))
        return bound.masked_fill(recent == 0, torch.iinfo(bound.dtype).max)

    def shrink(self, capacity: int) -> None:
        """Let go of slots behind ``capacity``, none of which may be in use."""
        assert capacity >= self.span
        if capacity < self.capacity:
            self.capacity = capacity
            self.slot_pos, self.evictable = (x[:, :capacity].clone() for x in (self.slot_pos, self.evictable))
            self.state = {name: row[:, :capacity].clone() for name, row in self.state.items()}

    def hide(self, mask: torch.Tensor) -> None:
        super().hide(mask)
        if self.rows:
            self.tokens = self.tokens_by_line()

    def evict_columns(self, drop: torch.Tensor) -> None:
        super().evict_columns(drop)
        self.tokens = self.tokens_by_line()

    def pick_rows(self, rows: torch.Tensor) -> None:
        lines = self.lines_of(rows)
        known = list(zip(self.tokens, self.prompt, self.limits, self.recent))
        super().pick_rows(rows)
        chosen = [known[line] for line in ([0] * len(lines) if len({*known}) == 1 else lines.tolist())]
        self.tokens, self.prompt, self.limits, self.recent = (list(found) for found in zip(*chosen))

    def counters(self) -> dict[str, Any]:
        made = torch.zeros(self.length, dtype=torch.bool)
        for columns in self._made:
            made[columns.start : columns.stop] = True
        if not self.rows or not len(made):
            return super().counters()
        column = self.slot_pos.cpu().long()
        held = ((column >= 0) & made[column.clamp_min(0)]).sum(1).view(self.rows, self.heads).amax(1).tolist()
        return {**super().counters(), "held": held}
