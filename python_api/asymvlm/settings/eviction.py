"""Which tokens leave the K/V cache while decoding and between turns: plain settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from asymvlm.methods import H2O, CachedMethod, LastRow, find_method
from asymvlm.methods.cached.base import SCOPES
from asymvlm.settings.numbers import check_count, check_retention
from asymvlm_kernels.millionths import part_of

SCORES = ("accumulated", "last")
RECENT = 2 / 3  # of the tokens that an eviction leaves: what natural text needs, and transcripts hardly mind


@dataclass(frozen=True)
class TextEviction:
    """Remove generated tokens from the K/V cache while decoding. The prompt and the newest tokens always stay.

    `TextEviction.paper` makes the setting of the AsymVLM paper.

    Args:
        threshold: T: nothing happens up to that many generated tokens.
        retention: r in (0, 1]; 1 evicts one token for each new one, once T are held.
        mode: ``"hysteresis"``: when more than T are held, the lowest scored go until floor(r * T) remain, and the cache
            grows back. ``"proportional"``: past T generated tokens, floor(r * generated) are held.
        recent: newest tokens that are never evicted, the newest one counted. None: two thirds of floor(r * T) for
            ``score="accumulated"``, 1 for ``"last"``, what a ``method`` says of itself.
        layers: whose attention scores a token where the scope is the decoder: ``"last"``, the last full-attention
            layer, or the mean over ``"all"``.
        sliding: what sliding-window layers do about evicted tokens: ``"keep"`` still sees them, ``"mask"`` does not,
            which is for the scope of the decoder. Neither saves bytes there: such a layer never holds more than its
            window.
        method: what scores a token in place of ``score`` and ``scope``: a `CachedMethod`, or the name of one. One whose
            ``scope`` is a layer or a head keeps other tokens in each, and each is scored by itself.
        score: ``"accumulated"``, `H2O`'s: the sum of the attention that a token has had from itself and the generated
            tokens since, as far as these came one a step while the patch was on; every step then scores. ``"last"``:
            the newest token's attention alone, at steps that evict.
        scope: who shares a choice: all layers of the ``"decoder"``, the heads of a ``"layer"``, or nobody: each K/V
            ``"head"`` its own.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    threshold: int
    retention: float
    mode: str = "hysteresis"
    recent: int | None = None
    layers: str = "last"
    sliding: str = "keep"
    method: CachedMethod | str | None = None
    score: str | None = None
    scope: str | None = None

    @classmethod
    def paper(cls, threshold: int, retention: float, **others: Any) -> TextEviction:
        """As published: the newest token's attention in the last full-attention layer chooses for all layers, and no
        token is spared for being recent. ``others`` are arguments of `TextEviction`.
        """
        return cls(threshold, retention, **{"score": "last", "scope": "decoder", **others})

    def __post_init__(self) -> None:
        if self.method is None:
            self._check_score()
        elif self.score is not None or self.scope is not None:
            raise ValueError(
                f"a method says score and scope itself: pass it or them, got method={self.method!r} beside "
                f"score={self.score!r} and scope={self.scope!r}"
            )
        else:
            object.__setattr__(self, "method", find_method(self.method, CachedMethod))
        method = self.scored_by
        if method.needs_limit:
            raise ValueError(f"method {method.name!r} needs CacheLimit(...), got it in TextEviction(...)")
        if method.scope not in SCOPES:
            raise ValueError(f"the scope of a method must be one of {', '.join(SCOPES)}, got {method.scope!r}")
        if method.sinks is not None:
            check_count("sinks", method.sinks, 0)
            if method.adds_up:
                raise ValueError(
                    f"method {method.name!r} adds up the attention of generated tokens here, with the prompt "
                    f"protected: sinks must be None, got {method.sinks}; CacheLimit(...) adds up that of the prompt too"
                )
        check_count("threshold", self.threshold, 1)
        check_retention(self.retention)
        for name, wanted in (
            ("mode", ("hysteresis", "proportional")),
            ("layers", ("last", "all")),
            ("sliding", ("keep", "mask")),
        ):
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name} must be {wanted[0]!r} or {wanted[1]!r}, got {getattr(self, name)!r}")
        for name, value in (("sliding", "mask"), ("layers", "all")):
            if getattr(self, name) == value and method.scope != "decoder":
                raise ValueError(
                    f"{name}={value!r} is for one choice for all layers, scope='decoder', got scope={method.scope!r}"
                )
        if self.recent is not None:
            check_count("recent", self.recent, 0)
        if self.kept(self.threshold) < self.guard:
            raise ValueError(
                f"floor(retention * threshold) must be at least {self.guard}, the tokens that always stay, got "
                f"{self.kept(self.threshold)} for threshold {self.threshold} and retention {self.retention}"
            )

    def _check_score(self) -> None:
        """Settle ``score`` and ``scope``."""
        for name, wanted in (("score", SCORES), ("scope", SCOPES)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, wanted[0] if name == "score" else "layer")
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name} must be one of {', '.join(wanted)}, got {getattr(self, name)!r}")

    @cached_property
    def scored_by(self) -> CachedMethod:
        """The method in effect."""
        if isinstance(self.method, CachedMethod):
            return self.method
        assert self.scope is not None
        return H2O(RECENT, scope=self.scope) if self.score == "accumulated" else LastRow(self.scope)

    @property
    def sinks(self) -> int | None:
        """First tokens of a prompt that stay; None: all of it."""
        return self.scored_by.sinks

    @property
    def guard(self) -> int:
        """Newest tokens that are no candidates."""
        recent = self.scored_by.recent(self.kept(self.threshold)) if self.recent is None else self.recent
        return max(1, recent)

    def kept(self, count: Any) -> Any:
        """``floor(retention * count)``, exactly; of a number or an integer tensor."""
        return part_of(count, self.retention)

    def excess(self, held: Any, generated: Any) -> Any:
        """How many tokens go, for ``held`` of ``generated`` tokens. Numbers or integer tensors."""
        hysteresis = self.mode == "hysteresis"
        over = (held if hysteresis else generated) > self.threshold
        count = (held - self.kept(self.threshold if hysteresis else generated)) * over
        return count.clamp_min(0) if isinstance(count, torch.Tensor) else max(count, 0)

    def most_held(self, generated: int | None) -> int | None:
        """Most generated tokens in the cache at once, for at most ``generated`` of them; None if there is no bound."""
        if self.mode == "hysteresis":
            return self.threshold + 1 if generated is None else min(self.threshold + 1, generated)
        return None if generated is None else min(generated, max(self.threshold, self.kept(generated)) + 1)


@dataclass(frozen=True)
class TurnEviction:
    """Remove whole answers of earlier turns from the K/V cache. Images, questions and the last answer always stay.

    At the start of a turn, when earlier answers hold more than ``threshold`` tokens, the answers least like the turn's
    images go, until floor(retention * held tokens) or fewer remain.

    Args:
        threshold: answer tokens up to which nothing happens.
        retention: r in (0, 1].
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    threshold: int = 512
    retention: float = 0.5

    def __post_init__(self) -> None:
        check_count("threshold", self.threshold, 0)
        check_retention(self.retention)

    def kept(self, count: int) -> int:
        """``floor(retention * count)``, exactly."""
        return part_of(count, self.retention)
