"""What a pruned prompt leaves on its cache, and how a later step written for the original length is made to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

UNKNOWN = torch.iinfo(torch.int64).min  # the id of a token that only a cache has seen
_ATTRIBUTE = "_asymvlm_state"


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
    state: PromptState | None = getattr(cache, _ATTRIBUTE, None)
    if state is not None and int(cache.get_seq_length()) < state.length:
        return None
    return state


def remember(cache: Any, state: PromptState) -> None:
    """Tie the state of a pruned prompt to the cache that holds it."""
    setattr(cache, _ATTRIBUTE, state)


def find_cache(output: Any) -> Any:
    """The cache in a model's output, as an attribute or in a tuple; None without one."""
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def repair_step(state: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A later step on a pruned cache, written for the original length: give it the mask and the positions that fit."""
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    new, mask = tokens.shape[1], kwargs.get("attention_mask")
    past = int(kwargs["past_key_values"].get_seq_length())
    kwargs = dict(kwargs)
    prompt_mask = state.attention_mask
    if mask is None:
        ones = prompt_mask.new_ones(prompt_mask.shape[0], past - state.length + new)
        kwargs["attention_mask"] = torch.cat([prompt_mask, ones], 1)
    elif mask.ndim == 2 and mask.shape[1] == past - state.length + state.original_length + new:
        kwargs["attention_mask"] = torch.cat([prompt_mask.to(mask), mask[:, state.original_length :]], 1)
    elif mask.ndim != 2 or mask.shape[1] != past + new:
        wanted = past - state.length + state.original_length + new
        raise ValueError(
            f"attention_mask must have {wanted} columns (original prompt and new tokens) or {past + new} (pruned), "
            f"got shape {tuple(mask.shape)}"
        )
    if kwargs.get("position_ids") is None:
        offsets = torch.arange(past - state.length, past - state.length + new, device=tokens.device)
        kwargs["position_ids"] = state.next_position + offsets
    return kwargs
