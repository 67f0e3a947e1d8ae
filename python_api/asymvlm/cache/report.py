"""What text eviction did in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asymvlm.cache.eviction_cache import CacheStats


@dataclass(frozen=True)
class EvictionReport:
    """``handle.last.eviction``: one call of `generate`. Lists have one entry a row.

    ``evicted`` counts tokens that left the cache during the call, those of whole ``answers`` (numbered from 0 by turn)
    included; ``cache`` is what is held afterwards.
    """

    evicted: list[int]
    answers: list[list[int]]
    cache: CacheStats

    def to_dict(self) -> dict[str, Any]:
        return {"evicted": self.evicted, "answers": self.answers, "cache": self.cache.to_dict()}
