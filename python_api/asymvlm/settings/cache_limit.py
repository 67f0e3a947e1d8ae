"""A limit of the whole K/V cache: plain settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from asymvlm.methods import CachedMethod, LastRow, find_method
from asymvlm.methods.cached.base import SCOPES
from asymvlm.settings.numbers import check_count
from asymvlm_kernels.millionths import part_of


@dataclass(frozen=True)
class CacheLimit:
    """Hold at most so many tokens of each row in the K/V cache, those of the prompt included.

    A method chooses behind each prompt, behind each step, or both. Give ``tokens`` or ``share``.

    Args:
        method: a `CachedMethod`, or the name of one (``"tova"``, ``"h2o"``, ``"snapkv"``, ...).
        tokens: most tokens of a row, in each layer; methods may divide them unequally among layers.
        share: the same as a share of the row's own prompts so far (what of them is not pruned before), rounded down.
        protect_prompt: the prompt always stays, and the limit counts generated tokens alone.
        layers: whose attention scores for a method that makes one choice for all layers: ``"last"``, the last
            full-attention layer, or the mean over ``"all"``.
        sliding: what sliding-window layers do about evicted tokens: ``"keep"`` still sees them, ``"mask"`` does not.
            That is for methods that make one choice for all layers.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    method: CachedMethod | str = LastRow()  # noqa: RUF009 frozen
    tokens: int | None = None
    share: float | None = None
    protect_prompt: bool = False
    layers: str = "last"
    sliding: str = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", find_method(self.method, CachedMethod))
        method = self.scored_by
        if method.scope not in SCOPES:
            raise ValueError(f"the scope of a method must be one of {', '.join(SCOPES)}, got {method.scope!r}")
        if method.sinks is not None:
            check_count("sinks", method.sinks, 0)
        if (self.tokens is None) == (self.share is None):
            raise ValueError(f"pass tokens or share, one of them, got tokens={self.tokens!r} and share={self.share!r}")
        for name, wanted in (("layers", ("last", "all")), ("sliding", ("keep", "mask"))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name} must be {wanted[0]!r} or {wanted[1]!r}, got {getattr(self, name)!r}")
        if self.sliding == "mask" and method.scope != "decoder":
            raise ValueError(
                f"sliding='mask' follows one choice for all layers, got a method of scope {method.scope!r}"
            )
        if self.protect_prompt and "step" not in method.moments:
            raise ValueError(
                f"method {method.name!r} chooses among the tokens of a prompt: protect_prompt leaves it none"
            )
        if self.tokens is not None:
            check_count("tokens", self.tokens, 1)
            self.check(self.tokens)
        elif isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")

    @property
    def scored_by(self) -> CachedMethod:
        """The method in effect."""
        assert isinstance(self.method, CachedMethod)
        return self.method

    @property
    def sinks(self) -> int | None:
        """First tokens of a prompt that stay; None: all of it."""
        return None if self.protect_prompt else self.scored_by.sinks or 0

    def most_held(self, generated: int | None) -> int:
        """Slots to allocate beside a prompt, before it has been cut: none."""
        return 0

    def of_prompt(self, prompt: int) -> int:
        """The limit of a row whose prompt has so many tokens."""
        if self.tokens is not None:
            return self.tokens
        assert self.share is not None
        return int(part_of(prompt, self.share))

    def check(self, limit: int) -> None:
        """Raise a ValueError if a limit is less than what always stays."""
        sinks, recent = self.sinks or 0, self.scored_by.recent(limit)
        if limit < max(sinks + recent, 1):
            raise ValueError(
                f"method {self.scored_by.name!r} always keeps {sinks} first and {recent} newest tokens: the limit must "
                f"be at least {max(sinks + recent, 1)}, got {limit}"
            )
