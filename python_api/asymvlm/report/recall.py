"""What came back to a cache before a question was read, and what is kept for that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RecallReport:
    """Of one call. Lists have one entry a row."""

    recalled: list[int]  # vision tokens that came back
    stored_bytes: int  # of embeddings and places beside the cache
    stored_on: str  # kind of device: "cpu", "cuda"
    seconds: float = 0.0  # scoring, the decoder's work and moving columns
    note: str = ""  # why nothing could come back

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
