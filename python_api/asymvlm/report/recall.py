"""What came back to a cache before a question was read, what left it, and what is kept for that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from asymvlm.prompt.state import PromptState


@dataclass
class RecallReport:
    """Of one call. Lists have one entry a row."""

    recalled: list[int]  # vision tokens that came back
    stored_bytes: int  # of embeddings and places beside the cache
    stored_on: str  # kind of device: "cpu", "cuda"
    seconds: float = 0.0  # scoring, the decoder's work and moving columns
    note: str = ""  # why nothing could come back
    left: list[int] = field(default_factory=list)  # vision tokens that left because the question did not want them
    computed: list[int] = field(default_factory=list)  # vision tokens whose K and V were computed

    def __post_init__(self) -> None:
        self.left = self.left or [0] * len(self.recalled)
        self.computed = self.computed or [0] * len(self.recalled)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stored_report(state: PromptState, *, later: bool) -> RecallReport | None:
    """Of a call with images, before which nothing comes back; None where nothing is stored."""
    if (store := state.recall) is None:
        return None
    note = "nothing recalled: the turn has images of its own" if later else ""
    return RecallReport([0] * len(state.index), store.nbytes, store.embeds.device.type, note=note)
