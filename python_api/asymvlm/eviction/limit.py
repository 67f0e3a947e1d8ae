"""Drives a limit of the whole cache: scores behind a prompt and behind each step, and the tokens beyond it go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.growing import CHUNK
from asymvlm.cache.limited import LimitedTable
from asymvlm.cache.table import SUMS
from asymvlm.eviction.call import EvictingCall
from asymvlm.eviction.reindex import Reindexing
from asymvlm.eviction.text import TextEvictor, seen_by_method
from asymvlm.hf import attention as capture
from asymvlm.hf.arguments import CACHE, IDS, POSITIONS, tokens_of
from asymvlm.hf.column_sums import Queries, seen_by
from asymvlm.hf.masks import FULL
from asymvlm.methods import CachedMethod
from asymvlm.methods.cached.base import ALL, BEHIND_VISION, RowLimit
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm_kernels.prefill.reference import compact


@dataclass(eq=False, kw_only=True)
class LimitStep(capture.Step):
    """A step of a limited cache: a part of a prompt, the end of one, or a generated token."""

    moment: str = "step"  # "part", "prompt", "step"


class LimitEvictor(TextEvictor):
    """As `TextEvictor`, for `CacheLimit`."""

    policy: CacheLimit
    method: CachedMethod

    def __init__(self, owner: Any, decoder: nn.Module, config: Any, policy: CacheLimit) -> None:
        super().__init__(owner, decoder, config, policy, None)
        self._reindexing = None
        if policy.scored_by.reindexes:
            try:
                self._reindexing = Reindexing(decoder, next(iter(self._layers.values())), config)
            except BaseException:
                self.remove()
                raise

    @contextlib.contextmanager
    def call(self, model: nn.Module, call: Mapping[str, Any], evicts: bool = True) -> Iterator[EvictingCall]:
        with super().call(model, call, evicts) as running:
            if self.method.queries == BEHIND_VISION:
                running.cache.behind_vision = self._behind_vision(model, running)
            try:
                yield running
            finally:
                running.cache.behind_vision = None

    def _behind_vision(self, model: nn.Module, running: EvictingCall) -> torch.Tensor:
        """``(B, columns)`` bool: columns of the prompt behind each row's last vision token."""
        ids = running.arguments.get(IDS)
        if ids is None:
            raise ValueError(f"method {self.method.name!r} needs input_ids, which tell where vision tokens are")
        later = self.owner.adapter.vision_mask(model, ids).flip(-1).cumsum(-1).flip(-1) == 0
        before = (running.cache.table.prompt_end or 0) - ids.shape[1]
        return torch.nn.functional.pad(later, (before, 0), value=False)

    def _started_over(self) -> EvictionCache:
        cache = super()._started_over()
        if self._running(cache) is not None:
            raise NotImplementedError(
                "LongRoPE passed its switch, where the whole sequence is fed again: a limited cache cannot start over"
            )
        return cache

    # -- before a step -----------------------------------------------------------------------------------------------

    def _arm(
        self,
        cache: EvictionCache,
        arguments: Mapping[str, Any],
        masks: dict[int, Any],
        mask: Any,
        real: torch.Tensor | None,
    ) -> None:
        capture.wanted.set(None)
        tokens = tokens_of(arguments)
        if self._reindexing is not None:
            self._reindexing.note(cache, arguments.get(POSITIONS), tokens.shape[1], tokens.device)
        if not (cache.evicts and self.owner.enabled):
            if masks:
                capture.wanted.set(capture.Step(masks=masks))
            return
        moment = _moment(cache, tokens.shape[1])
        begins = moment != "step" and not cache.in_prompt
        if begins and cache.anchors is not None and self.policy.protect_prompt:
            raise NotImplementedError("re-indexed positions with protect_prompt know one prompt, got a second one")
        cache.in_prompt = moment == "part"
        if moment == "part" and self.method.needs_samples:
            raise NotImplementedError(f"method {self.method.name!r} numbers prompts that come in one step, got a part")
        if begins and not self.method.adds_up:
            for table in _tables(cache):
                table.state.pop(SUMS, None)
                table.weights = None
        if not self.method.needs_density and (moment == "prompt" or (moment == "step" and not cache.has_limits)):
            self._limit(cache)
        due = moment in self.method.moments and any(any(table.over()) for table in _tables(cache))
        wanted = due or self.method.adds_up or moment == "part" or (moment == "prompt" and self.method.needs_density)
        places: dict[int, Any] = {}
        if wanted and moment == "step" and self.method.needs_attention:
            places = self._by_layer(cache, capture.Places)
        elif wanted and moment != "step" and self.method.queries:
            places = self._queries(cache, mask, real, tokens)
        self._check_sums(cache, tokens.shape[1])
        if due:
            self._count_asked(cache)
        capture.wanted.set(LimitStep(places=places, masks=masks, due=due, moment=moment))

    def _check_sums(self, cache: EvictionCache, queries: int) -> None:
        if not self.method.adds_up:
            return
        past = cast("int", cache.table.past)
        if cache.added_up != past:
            raise ValueError(
                f"method {self.method.name!r} adds up attention from the first token on: {past - cache.added_up} of "
                f"the cache's {past} tokens passed while it was off"
            )
        cache.added_up = past + queries

    def _queries(
        self, cache: EvictionCache, mask: Any, real: torch.Tensor | None, tokens: torch.Tensor
    ) -> dict[int, Queries]:
        """Which tokens of a prompt, or of a part of it, score the tokens that are there."""
        rows, count = tokens.shape[:2]
        first = cast("int", cache.table.past)
        if real is None:
            real = torch.ones((rows, count), dtype=torch.bool, device=tokens.device)
        seen = seen_by(mask.get(FULL) if isinstance(mask, dict) else mask, real, first)
        wanted, numbers = self.method.queries, None
        if wanted == BEHIND_VISION:
            marked = cache.behind_vision
            if marked is None:
                raise NotImplementedError(f"method {self.method.name!r} needs `generate`, which tells where images are")
            marked = marked.to(real.device).repeat_interleave(rows // len(marked), 0)
            marked = marked[:, first : first + count] & real
            numbers = compact(marked, max(int(marked.sum(1).max()), 1))
        elif wanted != ALL:
            assert isinstance(wanted, int)
            number = real.flip(-1).cumsum(-1).flip(-1) + _behind(cache, first + count, real)
            numbers = compact(real & (number <= wanted), min(wanted, count))
        q_pos = seen if numbers is None else seen.gather(1, numbers.clamp_min(0)).masked_fill(numbers < 0, -1)

        def make(slot_pos: torch.Tensor, column: torch.Tensor, heads: int) -> Queries:
            counts: list[torch.Tensor] | None = [] if self.method.needs_density else None
            return Queries(slot_pos, q_pos, numbers, heads, counts, self.method.density_threshold)

        return self._by_layer(cache, make)

    # -- behind it ---------------------------------------------------------------------------------------------------

    def after_decoder(self, arguments: Mapping[str, Any], output: Any) -> None:
        step = capture.wanted.get()
        if step is None:
            return
        capture.wanted.set(None)
        cache = arguments.get(CACHE)
        if output is None or not isinstance(cache, EvictionCache):
            return
        step.check()
        if not isinstance(step, LimitStep):
            return
        attention = {table.layer: self._attention(cache, table, step) for table in _tables(cache)}
        due = step.due
        if step.moment == "prompt" and self.method.needs_density:
            self._limit(cache)
            due = any(any(table.over()) for table in _tables(cache))
        if due:
            for table in _tables(cache):
                if any(table.over()):
                    self._drop(cache, table, attention[table.layer])
                    if step.moment == "prompt":
                        self._give_back(cache, table)
            if self._reindexing is not None:
                self._reindexing.move_up(cache)
        if step.due:
            self._count_taken(cache)

    def _attention(self, cache: EvictionCache, table: LimitedTable, step: LimitStep) -> torch.Tensor | None:
        """``(lines, slots)`` fp32 of what the method scores by; sums go on in the table's state."""
        if not step.places:
            return None
        place = step.places.get(table.layer)
        if isinstance(place, Queries) and place.counts:
            counts = place.counts[0].to(table.slot_pos.device)
            table.weights = counts if table.weights is None else table.weights + counts
        found = (step.found[table.layer] if cache.is_split else step.mean()).to(table.slot_pos.device)
        parts = step.moment != "step" and (step.moment == "part" or SUMS in table.state)
        return table.slot_state(SUMS).add_(found) if self.method.adds_up or parts else found

    def _drop(self, cache: EvictionCache, table: LimitedTable, attention: torch.Tensor | None) -> None:
        tokens = seen_by_method(cache, table, attention)
        table.drop(self.method.scores(tokens))

    def _limit(self, cache: EvictionCache) -> None:
        """Give each line its limit, by the prompt of its row."""
        tables, cache.has_limits = _tables(cache), True
        counts = [None if table.weights is None else table.weights.tolist() for table in tables]
        for table in tables:
            table.limits, table.recent = [], []
        for row in range(cache.table.rows):
            prompt = tables[0].prompt[row * tables[0].heads]
            large = [found[row] for found in counts if found is not None]
            if not all(seen for _, seen in large):
                raise ValueError(f"method {self.method.name!r} needs tokens behind the image, row {row} has none")
            whole = RowLimit(
                tokens=self.policy.of_prompt(prompt),
                prompt=prompt,
                layers=len(tables),
                heads=tables[0].heads,
                density=tuple(part / seen for part, seen in large) if self.method.needs_density else None,
            )
            self.policy.check(whole.tokens)
            for table, limits in zip(tables, self.method.limits(whole), strict=True):
                self._set_limits(table, limits)

    def _set_limits(self, table: LimitedTable, limits: list[int | None]) -> None:
        """Of the lines of one more row."""
        for limit in limits:
            if limit is not None:
                self.policy.check(limit)
            table.limits.append(limit)
            table.recent.append(0 if limit is None else self.method.recent(limit))

    def _give_back(self, cache: EvictionCache, table: LimitedTable) -> None:
        """Free the slots that a prompt needed and its answer does not."""
        room = CHUNK if cache.room is None else cache.room
        most = table.span + room
        if "step" in self.method.moments and not self.policy.protect_prompt and None not in table.limits:
            most = min(most, max(limit or 0 for limit in table.limits) + 1)
        cache.shrink(table, max(most, table.span))


def _tables(cache: EvictionCache) -> list[LimitedTable]:
    return cast("list[LimitedTable]", cache.tables)


def _moment(cache: EvictionCache, queries: int) -> str:
    """What a step is that has its slots: a "part" of a prompt, its last one ("prompt"), or a generated token ("step").

    In a loop of the caller's own each step of several tokens is a prompt.
    """
    end, prompt_end = cast("int", cache.table.past) + queries, cache.table.prompt_end
    if prompt_end is None:
        return "step" if queries == 1 and end > 1 else "prompt"
    return "part" if end < prompt_end else "prompt" if end == prompt_end else "step"


def _behind(cache: EvictionCache, end: int, real: torch.Tensor) -> torch.Tensor:
    """``(B, 1)`` int64: tokens of the prompt that are still to come, from column ``end`` on."""
    table = cache.table
    if table.prompt_mask is not None:
        return table.prompt_mask[:, end:].to(real.device).sum(1, keepdim=True)
    left = 0 if table.prompt_end is None else table.prompt_end - end
    return torch.full((len(real), 1), left, device=real.device)
