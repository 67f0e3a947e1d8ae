"""Settings of eviction that hold equal tokens, as rows of a table: on the small VLM and on real language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asymvlm import CacheLimit, TextEviction
from asymvlm.methods import CachedMethod


@dataclass(frozen=True)
class Entry:
    """A row of a table. ``method`` None: `TextEviction` by ``recent``, ``score`` and ``scope``; None is its default."""

    name: str
    method: CachedMethod | None = None
    protected: bool = True
    recent: int | None = None
    score: str | None = None
    scope: str | None = None

    @classmethod
    def paper(cls, name: str, recent: int = 0) -> Entry:
        """`TextEviction.paper`, with so many recent tokens kept."""
        return cls(name, recent=recent, score="last", scope="decoder")

    @property
    def title(self) -> str:
        return f"{self.name}, prompt {'protected' if self.protected else 'not protected'}"

    def equal_to(self, held: int, prompt: int, generated: int) -> dict[str, Any]:
        """Arguments of `asymvlm.patch` that hold, at the end, as many tokens as a prompt and ``held`` more.

        Args:
            prompt: its tokens. generated: tokens behind it by the end, all of which stay where a method chooses behind
                the prompt alone: its prompt is cut by what they will take.
        """
        if self.method is None:
            return {"text": TextEviction(held, 1.0, recent=self.recent, score=self.score, scope=self.scope)}
        if "step" not in self.method.moments:
            return {"cache": CacheLimit(self.method, tokens=prompt + held - generated)}
        tokens = held if self.protected else prompt + held
        return {"cache": CacheLimit(self.method, tokens=tokens, protect_prompt=self.protected)}


__all__ = ["Entry"]
