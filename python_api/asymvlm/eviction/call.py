"""One call of `generate` that evicts: its arguments, the cache that it gets, and the check that its steps took hold."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.cache.report import EvictionReport
from asymvlm.hf.arguments import CACHE, EMBEDS, IDS, MASK, USE_CACHE
from asymvlm.hf.context import Frame
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.generation import infer_attention_mask, setting
from asymvlm.models.adapter import Adapter
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.eviction import TextEviction

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


def kind_of(policy: TextEviction | CacheLimit | None) -> dict[str, Any]:
    """What an `EvictionCache` has to know of a policy."""
    if policy is None:
        return {}
    return {"scope": policy.scored_by.scope, "sinks": policy.sinks, "limited": isinstance(policy, CacheLimit)}


def check_scope(cache: EvictionCache, policy: TextEviction | CacheLimit | None) -> None:
    """Raise a ValueError if a cache cannot hold what the policy's method wants to keep."""
    if policy is not None and cache.scope != policy.scored_by.scope:
        raise ValueError(
            f"method {policy.scored_by.name!r} needs EvictionCache(config, scope={policy.scored_by.scope!r}), "
            f"got one of scope {cache.scope!r}"
        )
    limited = isinstance(policy, CacheLimit)
    if cache.limited != limited or (limited and policy is not None and cache.table.sinks != policy.sinks):
        wanted = kind_of(policy) if limited else {"limited": False}
        told = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise ValueError(
            f"the cache must be one like EvictionCache(config, {told}), got one with sinks={cache.table.sinks!r} and "
            f"limited={cache.limited!r}"
        )


def prepare(
    model: nn.Module,
    adapter: Adapter,
    policy: TextEviction | CacheLimit | None,
    call: Mapping[str, Any],
    evicts: bool = True,
) -> dict[str, Any]:
    """The arguments of a `generate` call with a cache to evict from. ``call`` is left as it is.

    Raises:
        NotImplementedError: for decoding methods that need a cache to be cropped, and for other caches.
        ValueError: if the call turns the cache off.
    """
    call, method = dict(call), None if policy is None else policy.scored_by
    _check_call(model, call)
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
    most = _most_new(model, call, columns)
    cache = call.get(CACHE)
    if cache is None:
        cache = _new_cache(model, policy, call, columns, most, evicts)
    elif isinstance(cache, EvictionCache):
        if cache.is_static and cache.table.rows and adapter.brings_vision(call):
            raise NotImplementedError("new images on a static cache with text eviction are not supported")
        check_scope(cache, policy)
    else:
        raise NotImplementedError(
            f"text eviction needs its own cache, got a {type(cache).__name__}: leave the cache out, or pass "
            "the one that an earlier call returned"
        )
    call[CACHE] = cache
    cache.room = most
    call.pop("cache_implementation", None)
    config = call.get("generation_config") or getattr(model, "generation_config", None)
    if config is not None and config.cache_implementation is not None:
        call["generation_config"] = copy.deepcopy(config)
        call["generation_config"].cache_implementation = None
    real = None
    if mask is not None and not bool(mask.bool().all()):
        real = mask.bool().repeat_interleave(repeats, 0)
    for table in cache.tables:
        table.prompt_end = columns if mask is None else max(columns, mask.shape[1])
        if real is not None:
            table.prompt_mask = real
            if table.rows:
                table.hide(real)
    if method is not None and method.needs_samples and cache.samples is None and ids is not None:
        cache.samples = _sample_numbers(ids, mask).repeat_interleave(repeats)
    return call


def _check_call(model: nn.Module, call: Mapping[str, Any]) -> None:
    """Refuse a way of decoding that would crop the cache, or has none."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if setting(model, call, name) is not None:
            raise NotImplementedError(
                f"text eviction does not work with {name}: drafted tokens are taken back from the end of the "
                "cache, whose last slots need not be the last tokens"
            )
    if setting(model, call, USE_CACHE) is False:
        raise ValueError("text eviction needs the K/V cache, got use_cache=False")


def _most_new(model: nn.Module, call: Mapping[str, Any], columns: int) -> int | None:
    """Most tokens that a call generates behind so many columns, if it says so."""
    new = setting(model, call, "max_new_tokens")
    total = setting(model, call, "max_length") if new is None else columns + new
    return None if total is None else max(total - columns, 0)


def _new_cache(
    model: nn.Module,
    policy: TextEviction | CacheLimit | None,
    call: Mapping[str, Any],
    columns: int,
    most: int | None,
    evicts: bool,
) -> EvictionCache:
    name = setting(model, call, "cache_implementation")
    if name == "hybrid" and call.get("cache_implementation") != name:
        name = None  # old checkpoints of Gemma say so, and transformers does not listen to them either
    if name not in (None, "dynamic", *STATIC):
        raise NotImplementedError(f"text eviction works with cache_implementation None or 'static', got {name!r}")
    held = most if policy is None or not evicts else policy.most_held(most)
    if name not in STATIC:
        return EvictionCache(model.config, capacity=None if held is None else columns + held, **kind_of(policy))
    if most is None or held is None:
        raise ValueError("a static cache needs max_new_tokens or max_length, got neither")
    total = columns + most
    return EvictionCache(model.config, capacity=columns + held, static=True, max_length=total, **kind_of(policy))


def rows_of(model: nn.Module, call: Mapping[str, Any]) -> int:
    """Rows of the cache of a call."""
    prompt = call[EMBEDS] if call.get(IDS) is None else call[IDS]
    return len(prompt) * _repeats(model, call)


def _repeats(model: nn.Module, call: Mapping[str, Any]) -> int:
    """Rows of the cache for each row of the call."""
    return max(setting(model, call, "num_beams") or 1, setting(model, call, "num_return_sequences") or 1)


def _sample_numbers(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``(B,)`` int64: a number made from each row's real ids, whatever the batch around it."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    rows = [zlib.crc32(repr([i for i, r in zip(*row) if r]).encode()) for row in zip(ids.tolist(), real.tolist())]
    return torch.tensor(rows, dtype=torch.int64)
