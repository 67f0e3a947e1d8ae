"""What a pruned prompt leaves on its cache, and how a later step written for the original length is made to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.hf.arguments import CACHE, IDS, MASK, POSITIONS, past_length, tokens_of
from asymvlm.hf.caches import cache_rows
from asymvlm.hf.pruned_cache import held, hold

if TYPE_CHECKING:
    from asymvlm.prompt.recall_store import RecallStore

UNKNOWN = torch.iinfo(torch.int64).min  # the id of a token that only a cache has seen


ROWS = ("original_ids", "original_lengths", "index", IDS, MASK)  # fields with rows in front


@dataclass(frozen=True, eq=False)
class PromptState:
    """The shortened prompt as later steps see it. It lives and dies with the cache."""

    original_ids: torch.Tensor  # (B, S), UNKNOWN for tokens of a loop by hand that a later image is behind
    original_lengths: torch.Tensor  # (B,) real tokens among them
    index: torch.Tensor  # (B, S') int64, original place of each kept token, -1 = padding
    input_ids: torch.Tensor  # (B, S')
    attention_mask: torch.Tensor  # (B, S') int64
    position_ids: torch.Tensor  # (B, S') or (R, B, S'), as the decoder sees them
    next_position: torch.Tensor  # (B, 1) or (R, B, 1): position of the first token after the prompt
    recall: RecallStore | None = None  # what may come back, where that is asked for

    def rows(self, index: torch.Tensor) -> PromptState:
        """Of the rows ``index`` ``(rows,)``, in that order."""
        index = index.to(self.index.device)
        picked = {name: getattr(self, name)[index] for name in ROWS}
        for name in (POSITIONS, "next_position"):
            picked[name] = getattr(self, name).index_select(-2, index)
        return PromptState(**picked, recall=None if self.recall is None else self.recall.rows(index))

    @property
    def original_length(self) -> int:
        """S, the columns of the prompt as the caller knows it."""
        return self.original_ids.shape[1]

    @property
    def length(self) -> int:
        """S', the columns of the shortened prompt."""
        return self.index.shape[1]


def state_of(cache: Any) -> PromptState | None:
    """The state of a cache that holds a pruned prompt, None of any other (or of one that was reset since)."""
    state = held(cache)
    if not isinstance(state, PromptState):
        return None
    if past_length(cache) < state.length:
        return None
    return state


def remember(cache: Any, state: PromptState) -> None:
    """Tie the state of a pruned prompt to the cache that holds it, with a row for each of the cache's (beams)."""
    repeats = cache_rows(cache, len(state.index)) // len(state.index)
    if repeats > 1:
        state = state.rows(torch.arange(len(state.index)).repeat_interleave(repeats))
    hold(cache, state)


def repair_step(state: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A later step on a pruned cache, written for the original length: give it the mask and the positions that fit."""
    tokens = tokens_of(kwargs)
    new, mask = tokens.shape[1], kwargs.get(MASK)
    past = past_length(kwargs[CACHE])
    kwargs = dict(kwargs)
    prompt_mask = state.attention_mask
    if mask is None:
        ones = prompt_mask.new_ones(prompt_mask.shape[0], past - state.length + new)
        kwargs[MASK] = torch.cat([prompt_mask, ones], 1)
    elif mask.ndim == 2 and mask.shape[1] == past - state.length + state.original_length + new:
        kwargs[MASK] = torch.cat([prompt_mask.to(mask), mask[:, state.original_length :]], 1)
    elif mask.ndim != 2 or mask.shape[1] != past + new:
        wanted = past - state.length + state.original_length + new
        raise ValueError(
            f"attention_mask must have {wanted} columns (original prompt and new tokens) or {past + new} (pruned), "
            f"got shape {tuple(mask.shape)}"
        )
    if kwargs.get(POSITIONS) is None:
        offsets = torch.arange(past - state.length, past - state.length + new, device=tokens.device)
        kwargs[POSITIONS] = state.next_position + offsets
    return kwargs
