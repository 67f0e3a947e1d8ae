"""What `generate` measures from the start of the prompt, told in terms of the shortened one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.cache_state import UNKNOWN, PromptState, remember
from asymvlm.models.adapter import Adapter
from asymvlm_kernels import gather_rows

STATIC_LENGTH = "_previous_max_cache_length"  # where transformers remembers the longest static cache of an instance


def restate_settings(model: nn.Module, call: Mapping[str, Any], state: PromptState) -> dict[str, Any]:
    """What `generate` measures or shows from the start of the prompt: lengths that count it, the streamer.

    ``max_length`` and ``min_length`` are returned as in effect for this call, less the dropped tokens. A keyword wins
    over the given generation config, which wins over the model's own; none of the configs is changed.
    """
    dropped = state.original_length - state.length
    restated: dict[str, Any] = {}
    if call.get("streamer") is not None:
        restated["streamer"] = PromptStreamer(call["streamer"], call["input_ids"])
    for name, override in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, call, name)
        if value and (call.get(name) is not None or setting(model, call, override) is None):
            restated[name] = max(value - dropped, 0)
    return restated


def infer_attention_mask(model: nn.Module, call: Mapping[str, Any]) -> torch.Tensor:
    """The mask `generate` makes when none is given: padding is where the pad id stands, unless it also ends a text."""
    input_ids: torch.Tensor = call["input_ids"]
    pad, eos = setting(model, call, "pad_token_id"), setting(model, call, "eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)


def setting(model: nn.Module, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting in effect for this call: keyword, then the given config, then the model's own."""
    configs = [call.get("generation_config"), getattr(model, "generation_config", None)]
    values = [call.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


@dataclass
class StaticLength:
    """Static cache length of pruned calls: else a long cache of an unpruned call would be built again for them."""

    length: int | None = None

    @contextlib.contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """For the time of a block, the model remembers this length instead of its own."""
        attributes = model.__dict__
        outside = attributes.pop(STATIC_LENGTH, None)
        if self.length is not None:
            attributes[STATIC_LENGTH] = self.length
        try:
            yield
        finally:
            self.length = attributes.pop(STATIC_LENGTH, None)
            if outside is not None:
                attributes[STATIC_LENGTH] = outside


class PromptStreamer:
    """Hands a streamer the original prompt where `generate` would put the shortened one."""

    def __init__(self, streamer: Any, original_ids: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = original_ids.cpu()

    def put(self, value: torch.Tensor) -> None:
        prompt, self._prompt = self._prompt, None
        self._streamer.put(value if prompt is None else prompt)

    def end(self) -> None:
        self._streamer.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)


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
    input_ids, length, mask = call["input_ids"], state.original_length, call["attention_mask"]
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
        "input_ids": torch.cat([known, input_ids[:, length:]], 1),
        "attention_mask": torch.cat([state.attention_mask.to(mask), mask[:, length:]], 1),
        # the model adds its first position itself
        "position_ids": torch.cat([state.position_ids, state.next_position + offsets], -1) - adapter.first_position,
    }


def check_conversation(adapter: Adapter, state: PromptState, call: Mapping[str, Any]) -> None:
    """Raise a ValueError unless ``input_ids`` and their masks go on from the prompt of the cache."""
    input_ids, length = call.get("input_ids"), state.original_length
    if input_ids is None:
        raise ValueError("a later turn on a pruned cache needs input_ids of the whole conversation, got none")
    same = input_ids.shape[0] == state.original_ids.shape[0] and input_ids.shape[1] > length
    if not same or not bool(((input_ids[:, :length] == state.original_ids) | (state.original_ids == UNKNOWN)).all()):
        raise ValueError(
            f"input_ids must go on from the prompt of the pruned cache, {tuple(state.original_ids.shape)}, got another "
            f"conversation of shape {tuple(input_ids.shape)}"
        )
    per_token = {name: call[name] for name in adapter.per_token if call.get(name) is not None}
    for name, tensor in {"attention_mask": call["attention_mask"], **per_token}.items():
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
            )


def with_original_prompt(result: Any, state: PromptState) -> Any:
    """Put the original prompt back in front of the generated ids, and the state on the returned cache."""
    sequences = result if torch.is_tensor(result) else result.sequences
    generated = sequences[:, state.length :]
    ids = state.original_ids.to(sequences).repeat_interleave(sequences.shape[0] // state.original_ids.shape[0], 0)
    sequences = torch.cat([ids, generated], 1)
    if torch.is_tensor(result):
        return sequences
    result.sequences = sequences
    if getattr(result, "past_key_values", None) is not None:
        remember(result.past_key_values, state)
    return result
