"""Where the memory of a call goes decides what is compressed: the paper's choice by token composition (its Table 1).

A call's sequence is its image tokens, its other prompt tokens and what it may generate. Where image tokens are more
than half of that, they are pruned before prefill; else generated text is evicted while decoding. With the paper's
settings short answers about pages are the first kind (vision 96-99 %), long answers and dialogues the second (27-37 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import IDS, MASK
from asymvlm.hf.generation import setting
from asymvlm.models.adapter import Adapter
from asymvlm.settings.eviction import TextEviction, TurnEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.roles import Tokens

DEFAULT_NEW_TOKENS = 20  # that `generate` makes where nothing says how many


@dataclass(frozen=True)
class Choice:
    """What was chosen for one call, ``handle.last.strategy``, and the token counts behind it, summed over rows."""

    vision_tokens: int
    text_tokens: int  # of the prompt, earlier answers included
    new_tokens: int  # that the call may generate

    @property
    def vision_share(self) -> float:
        return self.vision_tokens / max(self.vision_tokens + self.text_tokens + self.new_tokens, 1)

    @property
    def prunes_vision(self) -> bool:
        """True: vision tokens are pruned. False: generated text is evicted."""
        return self.vision_share > 0.5

    @property
    def reason(self) -> str:
        what = "vision tokens are pruned" if self.prunes_vision else "generated text is evicted"
        return (
            f"{what}: vision is {self.vision_share:.0%} of {self.vision_tokens} vision, {self.text_tokens} text and at "
            f"most {self.new_tokens} new tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "vision_share": self.vision_share, "reason": self.reason}


@dataclass(frozen=True)
class AutoStrategy:
    """What ``patch(model, strategy="auto")`` stands for.

    The rule counts what a call may generate (``max_new_tokens``), not what it will: an answer's length is known when it
    is over. In a loop of the caller's own it is unknown, so pruning goes by the prompt alone, and eviction waits for
    its threshold.

    Args:
        vision: pruning where vision dominates.
        text: eviction where text does; by default with the paper's threshold and retention for long answers.
        turns: eviction of whole answers in dialogues, by default the paper's setting.
    """

    vision: VisionPruning = field(default_factory=VisionPruning)
    text: TextEviction = TextEviction(threshold=90, retention=0.5)  # noqa: RUF009 frozen
    turns: TurnEviction = TurnEviction(threshold=512, retention=0.5)  # noqa: RUF009 frozen

    def choose(self, model: nn.Module, adapter: Adapter, call: Mapping[str, Any], *, generating: bool) -> Choice:
        """Count the tokens of a call. Synchronises once."""
        ids = call.get(IDS)
        if ids is None:
            return Choice(0, 0, 0)
        mask = call.get(MASK)
        usable = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
        tokens = Tokens.read(model, adapter, ids, mask if usable else None)
        vision, total = torch.stack([tokens.vision.sum(), tokens.real.sum()]).tolist()
        return Choice(vision, total - vision, len(ids) * _new_tokens(model, call, ids.shape[1]) if generating else 0)


def _new_tokens(model: nn.Module, call: Mapping[str, Any], columns: int) -> int:
    new = setting(model, call, "max_new_tokens")
    if new is not None:
        return int(new)
    total = setting(model, call, "max_length")
    return DEFAULT_NEW_TOKENS if total is None else max(int(total) - columns, 0)
