"""Drives text eviction through a patched model's calls: slots and masks before the decoder runs, eviction after it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.fixed import StaticSlots
from asymvlm.cache.masks import FULL, real_tokens, slot_masks
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.hf import attention as capture
from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, USE_CACHE, tokens_of
from asymvlm.hf.context import Frame, entered, innermost
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.generation import infer_attention_mask, setting
from asymvlm.hf.merge import merging
from asymvlm.report.eviction import EvictionReport
from asymvlm.settings.policies import TextEviction

STATIC = ("static", "hybrid", "sliding_window", "hybrid_chunked")  # names transformers gave its static caches


MECHANISM = "evicting generated tokens"


@dataclass(eq=False, kw_only=True)
class EvictingCall(Frame):
    """A call of `generate` and the cache that it evicts from."""

    arguments: dict[str, Any]
    cache: EvictionCache
    evicted_before: list[int]
    owner: object
    sequences: torch.Tensor | None = None  # what the call returned, once it has
    asked: int = 0  # steps that were to evict, as far as the host counts them
    taken: int = 0  # steps that did

    def report(self) -> EvictionReport:
        stats = self.cache.stats()
        evicted = [now - then for now, then in zip(stats.evicted, self.evicted_before)]
        return EvictionReport(evicted, [sorted(row) for row in self.cache.dialogue.dropped], stats)

    def check(self) -> None:
        """Raise a MechanismError where a step was to evict and did not."""
        if self.asked != self.taken:
            raise MechanismError(MECHANISM, f"{self.asked} steps were to evict and {self.taken} did")

    def check_end(self) -> None:
        """Raise a MechanismError where the cache did not see every token of the call but the last."""
        self.check()
        if self.sequences is None:
            return
        ids = self.arguments.get(IDS)
        new = self.sequences.shape[1] - (0 if ids is None else ids.shape[1])
        wanted, seen = (self.cache.table.prompt_end or 0) + new - 1, int(self.cache.get_seq_length())
        if seen < wanted:
            raise MechanismError(MECHANISM, f"the cache has seen {seen} columns of {wanted}")


class TextEvictor:
    """What one decoder does before and after each step.

    ``policy`` None keeps the slots of a cache and evicts nothing by score.
    """

    def __init__(
        self, owner: Any, decoder: nn.Module, config: Any, policy: TextEviction | None, turns: TurnEvictor | None
    ) -> None:
        self.owner = owner  # the handle, for its `enabled` and its model
        self.turns = turns
        self.config = config
        self.policy = policy
        EvictionCache(config)  # refuses a decoder it does not know
        attention = capture.attention_modules(decoder)
        kinds = getattr(config, "layer_types", None) or [FULL] * len(cast("Any", decoder).layers)
        full = [index for index in attention if kinds[index] == FULL]
        full = full or sorted(attention)  # layers all "sliding" by a window that they never leave
        chosen = full if policy is not None and policy.layers == "all" else full[-1:]
        self._scored = [attention[index] for index in chosen] if policy is not None else []
        capture.install(self._scored)

    def remove(self) -> None:
        capture.remove(self._scored)

    # -- calls of generate ------------------------------------------------------------------------------------------

    @staticmethod
    def _rows(model: nn.Module, call: Mapping[str, Any]) -> int:
        prompt = call[EMBEDS] if call.get(IDS) is None else call[IDS]
        return len(prompt) * _repeats(model, call)

    @contextlib.contextmanager
    def call(self, model: nn.Module, call: Mapping[str, Any], evicts: bool = True) -> Iterator[EvictingCall]:
        """One call of `generate`, with a cache to evict from if it ``evicts``. Arguments and errors as in `prepare`."""
        arguments = self.prepare(model, call, evicts)
        cache: EvictionCache = arguments[CACHE]
        cache.evicts = evicts
        evicted = cache.table.counters()["evicted"] or [0] * self._rows(model, arguments)
        repeats = setting(model, call, "num_return_sequences") or 1
        running = EvictingCall(arguments=arguments, cache=cache, evicted_before=evicted, owner=self)
        cache.table.announced = True
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
            cache.table.announced = False

    def prepare(self, model: nn.Module, call: Mapping[str, Any], evicts: bool = True) -> dict[str, Any]:
        """The arguments of a `generate` call with a cache to evict from. ``call`` is left as it is.

        Raises:
            NotImplementedError: for decoding methods that need a cache to be cropped, and for other caches.
            ValueError: if the call turns the cache off.
        """
        call = dict(call)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if setting(model, call, name) is not None:
                raise NotImplementedError(
                    f"text eviction does not work with {name}: drafted tokens are taken back from the end of the "
                    "cache, whose last slots need not be the last tokens"
                )
        if setting(model, call, USE_CACHE) is False:
            raise ValueError("text eviction needs the K/V cache, got use_cache=False")
        ids = call.get(IDS)
        embeds = call.get(EMBEDS)
        prompt = ids if embeds is None else embeds
        if prompt is None:
            raise ValueError("text eviction needs input_ids or inputs_embeds")
        mask = call.get(MASK)
        if mask is None and ids is not None:
            mask = infer_attention_mask(model, call)
        columns = prompt.shape[1]
        repeats = _repeats(model, call)
        cache = call.get(CACHE)
        if cache is None:
            cache = self._new_cache(model, call, columns, evicts)
        elif isinstance(cache, EvictionCache):
            if cache.is_static and cache.table.rows and self.owner.adapter.brings_vision(call):
                raise NotImplementedError("new images on a static cache with text eviction are not supported")
        else:
            raise NotImplementedError(
                f"text eviction needs its own cache, got a {type(cache).__name__}: leave the cache out, or pass "
                "the one that an earlier call returned"
            )
        call[CACHE] = cache
        call.pop("cache_implementation", None)
        config = call.get("generation_config") or getattr(model, "generation_config", None)
        if config is not None and config.cache_implementation is not None:
            call["generation_config"] = copy.deepcopy(config)
            call["generation_config"].cache_implementation = None
        cache.table.prompt_end = columns if mask is None else max(columns, mask.shape[1])
        if mask is not None and not bool(mask.bool().all()):
            real = mask.bool().repeat_interleave(repeats, 0)
            cache.table.prompt_mask = real
            if cache.table.rows:
                cache.table.hide(real)
        return call

    def _new_cache(self, model: nn.Module, call: Mapping[str, Any], columns: int, evicts: bool) -> EvictionCache:
        name = setting(model, call, "cache_implementation")
        if name == "hybrid" and call.get("cache_implementation") != name:
            name = None  # old checkpoints of Gemma say so, and transformers does not listen to them either
        if name not in (None, "dynamic", *STATIC):
            raise NotImplementedError(f"text eviction works with cache_implementation None or 'static', got {name!r}")
        new = setting(model, call, "max_new_tokens")
        total = setting(model, call, "max_length") if new is None else columns + new
        most = None if total is None else max(total - columns, 0)
        held = most if self.policy is None or not evicts else self.policy.most_held(most)
        if name not in STATIC:
            return EvictionCache(model.config, capacity=None if held is None else columns + held)
        if total is None or held is None:
            raise ValueError("a static cache needs max_new_tokens or max_length, got neither")
        return EvictionCache(model.config, capacity=columns + held, static=True, max_length=total)

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
        tokens = tokens_of(arguments)
        rows, queries = tokens.shape[:2]
        mask, table = arguments.get(MASK), cache.table
        if mask is None and table.announced and table.prompt_mask is not None:
            raise MechanismError(MECHANISM, "the prompt has padding, and the decoder got no mask that would hide it")
        real = real_tokens(cache, mask, queries)
        fresh = not table.rows
        if queries > 1 and not fresh and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            table.hide(mask.bool())
        if self.turns is not None and self.owner.enabled and cache.dialogue.vision is not None:
            embeds = tokens if tokens.ndim == 3 else _shape_of(tokens, module)
            self.turns.before_prompt(self.owner.model, cache, embeds, queries)
        table.begin(rows, queries, tokens.device, real)
        remapped = table.remapped and not fresh
        if remapped:
            embeds = tokens if tokens.ndim == 3 else _shape_of(tokens, module)
            hide = self.policy is not None and self.policy.sliding == "mask"
            arguments[MASK] = slot_masks(self.config, cache, mask, embeds, hide)
        self._arm(cache, queries)
        return arguments if made or remapped else None

    def _started_over(self) -> EvictionCache:
        """A new cache: for a loop of the caller's own, or inside `generate` where LongRoPE passes its switch.

        There the whole sequence is fed again, evicted tokens too; as far as it was generated it stays evictable.
        """
        cache, running = EvictionCache(self.config), innermost(EvictingCall)
        if running is not None and running.owner is self:
            before, running.cache = running.cache, cache
            cache.evicts, cache.dialogue = before.evicts, before.dialogue
            cache.table.prompt_end = before.table.prompt_end
            cache.table.prompt_mask = before.table.prompt_mask
            cache.table.announced = True
            running.evicted_before = [then - now for then, now in zip(running.evicted_before, before.stats().evicted)]
        return cache

    def _wants_cache(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the decoder is about to make a cache of its own."""
        use = kwargs.get(USE_CACHE)
        use = getattr(self.config, USE_CACHE, True) if use is None else use
        return bool(use) and self.owner.enabled and not torch.is_grad_enabled()

    def _arm(self, cache: EvictionCache, queries: int) -> None:
        table, scores = cache.table, None
        capture.wanted.set(None)
        if self.policy is None or not cache.evicts or not self.owner.enabled or queries != 1:
            return
        if isinstance(table, StaticSlots):  # the count is on the device: every step scores, the last layer only
            scores = capture.Scores(slot_pos=table.slot_pos, q_pos=table.column)
        elif any(table.excess(self.policy)):
            scores = capture.Scores(slot_pos=table.slot_pos[:, : table.span].contiguous(), q_pos=table.column)
        if scores is None:
            return
        if not torch.compiler.is_compiling() and (running := self._running(cache)) is not None:
            running.check()
            running.asked += 1
        capture.wanted.set(scores)

    def _running(self, cache: EvictionCache) -> EvictingCall | None:
        """The call of `generate` that this step of the cache belongs to."""
        running = innermost(EvictingCall)
        return running if running is not None and running.cache is cache else None

    def after_decoder(self, arguments: dict[str, Any], output: Any) -> None:
        """Evict by the scores that the step handed out. ``arguments`` and ``output`` as of `Door`."""
        scores = capture.wanted.get()
        if scores is None:
            return
        capture.wanted.set(None)
        cache = arguments.get(CACHE)
        if output is None or not isinstance(cache, EvictionCache) or self.policy is None:
            return
        cache.table.evict(scores.mean(), self.policy)
        if not torch.compiler.is_compiling() and (running := self._running(cache)) is not None:
            running.taken += 1


def _repeats(model: nn.Module, call: Mapping[str, Any]) -> int:
    """Rows of the cache for each row of the call."""
    return max(setting(model, call, "num_beams") or 1, setting(model, call, "num_return_sequences") or 1)


def _shape_of(input_ids: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Embeddings of width 0: masks take rows, queries, dtype and device from them."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return torch.empty((*input_ids.shape, 0), dtype=dtype, device=input_ids.device)
