"""Drives text eviction through a patched model's calls: slots and masks before the decoder runs, eviction after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.layers import SlotLayer
from asymvlm.cache.masks import FULL, layer_masks, real_tokens, slot_masks
from asymvlm.cache.table import Table
from asymvlm.eviction.call import MECHANISM, EvictingCall, check_scope, kind_of, prepare, rows_of
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.hf import attention as capture
from asymvlm.hf.arguments import CACHE, MASK, USE_CACHE, tokens_of
from asymvlm.hf.context import entered, innermost
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.generation import setting
from asymvlm.hf.merge import merging
from asymvlm.methods import CachedTokens
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.eviction import TextEviction


class TextEvictor:
    """What one decoder does before and after each step.

    ``policy`` None keeps the slots of a cache and evicts nothing by score.
    """

    def __init__(
        self,
        owner: Any,
        decoder: nn.Module,
        config: Any,
        policy: TextEviction | CacheLimit | None,
        turns: TurnEvictor | None,
    ) -> None:
        self.owner = owner  # the handle, for its `enabled` and its model
        self.turns = turns
        self.config = config
        self.policy = policy
        self.method = None if policy is None else policy.scored_by
        self._adds_up = self.method is not None and self.method.adds_up
        cache = EvictionCache(config, **kind_of(policy))  # refuses a decoder it does not know
        self._split, attention = cache.is_split, capture.attention_modules(decoder)
        evicting = {index for index, layer in enumerate(cache.layers) if isinstance(layer, SlotLayer)}
        if lost := sorted(evicting - set(attention)):
            raise NotImplementedError(
                f"text eviction wants layers with a self_attn, layers {lost} of {type(decoder).__name__} have none"
            )
        kinds = getattr(config, "layer_types", None) or [FULL] * len(cast("Any", decoder).layers)
        full = [index for index in attention if kinds[index] == FULL]
        full = full or sorted(attention)  # layers all "sliding" by a window that they never leave
        chosen = full if policy is not None and policy.layers == "all" else full[-1:]
        chosen = sorted(evicting) if self._split else chosen
        self._layers = {index: attention[index] for index in chosen} if policy is not None else {}
        capture.install(self._layers)

    def remove(self) -> None:
        capture.remove(self._layers)

    # -- calls of generate ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self, model: nn.Module, call: Mapping[str, Any], evicts: bool = True) -> Iterator[EvictingCall]:
        """One call of `generate`, with a cache to evict from if it ``evicts``. Arguments and errors as in `prepare`."""
        arguments = prepare(model, self.owner.adapter, self.policy, call, evicts)
        cache: EvictionCache = arguments[CACHE]
        cache.evicts = evicts
        evicted = cache.counters()["evicted"] or [0] * rows_of(model, arguments)
        repeats = setting(model, call, "num_return_sequences") or 1
        running = EvictingCall(arguments=arguments, cache=cache, evicted_before=evicted, owner=self)
        for table in cache.tables:
            table.announced = True
        try:
            with entered(running):
                if self.turns is not None:
                    self.turns.begin(model, arguments, cache, repeats)
                yield running
            running.check_end()
            if self.turns is not None and running.sequences is not None:
                self.turns.end(model, arguments, running.cache, running.sequences)
        finally:
            running.cache.end_call()
            cache.end_call()

    # -- one forward pass of the decoder ----------------------------------------------------------------------------

    def before_decoder(self, module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Give the step its slots and the mask that fits them. ``arguments`` as of `Door`."""
        if not torch.compiler.is_compiling() and merging():
            return None
        cache, made = arguments.get(CACHE), False
        if cache is None and self._wants_cache(arguments):
            cache, made = self._started_over(), True
            arguments[CACHE] = cache
        running = None if torch.compiler.is_compiling() else innermost(EvictingCall)
        if running is not None and running.owner is self and running.cache is not cache:
            raise MechanismError(MECHANISM, f"a step came with another cache, {type(cache).__name__}, than the call's")
        if not isinstance(cache, EvictionCache):
            return None
        check_scope(cache, self.policy)
        tokens = tokens_of(arguments)
        rows, queries = tokens.shape[:2]
        mask, table = arguments.get(MASK), cache.table
        if mask is None and table.announced and table.prompt_mask is not None:
            raise MechanismError(MECHANISM, "the prompt has padding, and the decoder got no mask that would hide it")
        real = real_tokens(cache, mask, queries)
        fresh = not table.rows
        if queries > 1 and not fresh and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            cache.hide(mask.bool())
        if self.turns is not None and self.owner.enabled and cache.dialogue.vision is not None:
            embeds = tokens if tokens.ndim == 3 else _shape_of(tokens, module)
            self.turns.before_prompt(self.owner.model, cache, embeds, queries)
        if fresh and self.method is not None and self.method.needs_samples and tokens.ndim == 3:
            cache.tell_apart(tokens, real)
        cache.begin(rows, queries, tokens.device, real)
        remapped = not fresh and any(table.remapped for table in cache.tables)
        own: dict[int, Any] = {}
        if remapped:
            embeds = tokens if tokens.ndim == 3 else _shape_of(tokens, module)
            hide = self.policy is not None and self.policy.sliding == "mask"
            arguments[MASK] = slot_masks(self.config, cache, mask, embeds, hide)
            if cache.is_split:
                own = layer_masks(self.config, cache, mask, embeds)
        self._arm(cache, arguments, own, mask, real)
        return arguments if made or remapped else None

    def _started_over(self) -> EvictionCache:
        """A new cache: for a loop of the caller's own, or inside `generate` where LongRoPE passes its switch.

        There the whole sequence is fed again, evicted tokens too; as far as it was generated it stays evictable.
        """
        cache, running = EvictionCache(self.config, **kind_of(self.policy)), innermost(EvictingCall)
        if running is not None and running.owner is self:
            before, running.cache = running.cache, cache
            cache.evicts, cache.dialogue, cache.samples = before.evicts, before.dialogue, before.samples
            for table in cache.tables:
                table.prompt_end, table.prompt_mask = before.table.prompt_end, before.table.prompt_mask
                table.announced = True
            running.evicted_before = [then - now for then, now in zip(running.evicted_before, before.stats().evicted)]
        return cache

    def _wants_cache(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the decoder is about to make a cache of its own."""
        use = kwargs.get(USE_CACHE)
        use = getattr(self.config, USE_CACHE, True) if use is None else use
        return bool(use) and self.owner.enabled and not torch.is_grad_enabled()

    def _arm(
        self,
        cache: EvictionCache,
        arguments: Mapping[str, Any],
        masks: dict[int, Any],
        mask: Any,
        real: torch.Tensor | None,
    ) -> None:
        """Tell the layers what the step asks of them: scores where tokens are due to go, masks of their own.

        ``mask`` is the decoder's as it came, ``real`` as of `real_tokens`.
        """
        capture.wanted.set(None)
        alone = self.owner.enabled and tokens_of(arguments).shape[1] == 1
        policy = cast("TextEviction | None", self.policy) if alone and cache.evicts else None
        due = policy is not None and cache.table.wants_scores(policy)
        adds = alone and self._adds_up and (cache.is_static or cache.table.generating)
        if not (due or adds or masks):
            return
        places = {}
        if adds or (due and self.method is not None and self.method.needs_attention):
            places = self._by_layer(cache, capture.Places)
        if due:
            self._count_asked(cache)
        capture.wanted.set(capture.Step(places=places, masks=masks, due=due))

    def _by_layer(self, cache: EvictionCache, make: Callable[[torch.Tensor, torch.Tensor, int], Any]) -> dict[int, Any]:
        """What each scored layer is asked, made once a group: from slots, the step's column, heads."""
        lying = {table.layer: make(table.slots_in_use(), table.column, table.heads) for table in cache.tables}
        places = {}
        for number in self._layers:
            layer = cache.layers[number]
            places[number] = lying[(layer.table if isinstance(layer, SlotLayer) else cache.table).layer]
        return places

    def _count_asked(self, cache: EvictionCache) -> None:
        if not torch.compiler.is_compiling() and (running := self._running(cache)) is not None:
            running.check()
            running.asked += 1

    def _count_taken(self, cache: EvictionCache) -> None:
        if not torch.compiler.is_compiling() and (running := self._running(cache)) is not None:
            running.taken += 1

    def _running(self, cache: EvictionCache) -> EvictingCall | None:
        """The call of `generate` that this step of the cache belongs to."""
        running = innermost(EvictingCall)
        return running if running is not None and running.cache is cache else None

    def after_decoder(self, arguments: dict[str, Any], output: Any) -> None:
        """Add up what the step handed out, and evict where tokens are due to go.

        ``arguments`` and ``output`` as of `Door`.
        """
        step = capture.wanted.get()
        if step is None:
            return
        capture.wanted.set(None)
        cache = arguments.get(CACHE)
        if output is None or not isinstance(cache, EvictionCache) or self.policy is None or self.method is None:
            return
        step.check()
        for table in cache.tables:
            attention = None
            if step.places:
                attention = step.found[table.layer] if cache.is_split else step.mean()
                attention = table.add_up(attention) if self._adds_up else attention
            if step.due:
                tokens = seen_by_method(cache, table, attention, table.column)
                table.evict(self.method.scores(tokens), cast("TextEviction", self.policy))
        if step.due:
            self._count_taken(cache)


def seen_by_method(
    cache: EvictionCache, table: Table, attention: torch.Tensor | None, newest: torch.Tensor | None = None
) -> CachedTokens:
    """The tokens of a group of layers, as a method of the cache gets them.

    Args:
        newest: ``(lines,)`` int64; None means the newest that each line holds.
    """
    columns, samples = table.slots_in_use(), cache.samples
    return CachedTokens(
        columns=columns,
        newest=columns.amax(1).long() if newest is None else newest,
        attention=attention,
        generated=table.generated,
        samples=None if samples is None else table.by_line(samples.to(columns.device)),
        layer=table.layer if cache.is_split else None,
    )


def _shape_of(input_ids: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Embeddings of width 0: masks take rows, queries, dtype and device from them."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return torch.empty((*input_ids.shape, 0), dtype=dtype, device=input_ids.device)
