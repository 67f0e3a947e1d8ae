"""A `generate` on a pruned prompt, told in columns of the shortened one, and its result in those of the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import IDS, MASK, POSITIONS, cache_of
from asymvlm.hf.generation import PromptStreamer, setting
from asymvlm.models.adapter import Adapter
from asymvlm.prompt.state import UNKNOWN, PromptState, remember
from asymvlm_kernels import gather_rows


def restate_settings(model: nn.Module, call: Mapping[str, Any], state: PromptState) -> dict[str, Any]:
    """What `generate` measures or shows from the start of the prompt: lengths that count it, the streamer.

    ``max_length`` and ``min_length`` are returned as in effect for this call, less the dropped tokens. A keyword wins
    over the given generation config, which wins over the model's own; none of the configs is changed.
    """
    dropped = state.original_length - state.length
    restated: dict[str, Any] = {}
    if call.get("streamer") is not None:
        restated["streamer"] = PromptStreamer(call["streamer"], call[IDS])
    for name, override in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, call, name)
        if name == "max_length" and call.get(name) is not None and value <= state.original_length:
            raise ValueError(
                f"max_length={value} leaves no room behind a prompt of {state.original_length} tokens: pass a larger "
                "one, or max_new_tokens"
            )
        if value and (call.get(name) is not None or setting(model, call, override) is None):
            restated[name] = max(value - dropped, 0)
    return restated


def continue_call(adapter: Adapter, state: PromptState, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call that goes on from a pruned cache, told in terms of what the cache holds.

    Args:
        state: what the pruned prompt left on the cache, for B samples.
        call: arguments of `generate`, with ``input_ids`` ``(B, S + new)``: the whole conversation so far.
    Returns:
        The arguments to replace: ``input_ids``, ``attention_mask``, ``position_ids``, per-token inputs.
    Raises:
        ValueError: if ``input_ids`` do not start with the prompt of the cache.
    """
    check_conversation(adapter, state, call)
    input_ids, length, mask = call[IDS], state.original_length, call[MASK]
    per_token = {name: call[name] for name in adapter.per_token if call.get(name) is not None}
    # as `generate` counts: masked tokens, after an answer that ended early, take no position
    offsets = (mask[:, length:].long().cumsum(-1) - 1).clamp_min(0)
    changed: dict[str, Any] = {name: None for name in (*adapter.drop, *adapter.drop_when_pruned) if name in call}
    for name, tensor in per_token.items():
        if name not in adapter.drop_when_pruned:
            head = gather_rows(tensor[:, :length], state.index, pad=adapter.per_token[name])
            changed[name] = torch.cat([head, tensor[:, length:]], 1)
    known = torch.where(state.index >= 0, gather_rows(input_ids[:, :length], state.index, pad=0), state.input_ids)
    return changed | {
        IDS: torch.cat([known, input_ids[:, length:]], 1),
        MASK: torch.cat([state.attention_mask.to(mask), mask[:, length:]], 1),
        # the model adds its first position itself
        POSITIONS: torch.cat([state.position_ids, state.next_position + offsets], -1) - adapter.first_position,
    }


def check_conversation(adapter: Adapter, state: PromptState, call: Mapping[str, Any]) -> None:
    """Raise a ValueError unless ``input_ids`` and their masks go on from the prompt of the cache."""
    input_ids, length = call.get(IDS), state.original_length
    if input_ids is None:
        raise ValueError("a later turn on a pruned cache needs input_ids of the whole conversation, got none")
    same = input_ids.shape[0] == state.original_ids.shape[0] and input_ids.shape[1] > length
    if not same or not bool(((input_ids[:, :length] == state.original_ids) | (state.original_ids == UNKNOWN)).all()):
        raise ValueError(
            f"input_ids must go on from the prompt of the pruned cache, {tuple(state.original_ids.shape)}, got another "
            f"conversation of shape {tuple(input_ids.shape)}"
        )
    per_token = {name: call[name] for name in adapter.per_token if call.get(name) is not None}
    for name, tensor in {MASK: call[MASK], **per_token}.items():
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
            )


def with_original_prompt(result: Any, state: PromptState, given: Any) -> Any:
    """Put the original prompt back in front of the generated ids, and the state on the cache.

    Args:
        result: what `generate` returned. given: the cache that the caller handed in, or None.
    """
    for cache in (given, None if torch.is_tensor(result) else cache_of(result)):
        if cache is not None:
            remember(cache, state)
    sequences = result if torch.is_tensor(result) else result.sequences
    generated = sequences[:, state.length :]
    ids = state.original_ids.to(sequences).repeat_interleave(sequences.shape[0] // state.original_ids.shape[0], 0)
    sequences = torch.cat([ids, generated], 1)
    if torch.is_tensor(result):
        return sequences
    result.sequences = sequences
    return result
