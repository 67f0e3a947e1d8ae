"""What `generate` measures from the start of the prompt, told in terms of the shortened one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asymvlm.cache_state import remember
from asymvlm.prompt import PrunedPrompt

if TYPE_CHECKING:
    from asymvlm.patch import PatchHandle

STATIC_LENGTH = "_previous_max_cache_length"  # where transformers remembers the longest static cache of an instance


def shorten_lengths(model: nn.Module, call: Mapping[str, Any], dropped: int) -> dict[str, int]:
    """``max_length`` and ``min_length`` count the prompt: return them, in effect for this call, less ``dropped``.

    A keyword wins over the given generation config, which wins over the model's own; none of the configs is changed.
    """
    shortened = {}
    for name, override in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = _setting(model, call, name)
        if value and (call.get(name) is not None or _setting(model, call, override) is None):
            shortened[name] = max(value - dropped, 0)
    return shortened


def infer_attention_mask(model: nn.Module, call: Mapping[str, Any]) -> torch.Tensor:
    """The mask `generate` makes when none is given: padding is where the pad id stands, unless it also ends a text."""
    input_ids: torch.Tensor = call["input_ids"]
    pad, eos = _setting(model, call, "pad_token_id"), _setting(model, call, "eos_token_id")
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)


def _setting(model: nn.Module, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting in effect for this call: keyword, then the given config, then the model's own."""
    configs = [call.get("generation_config"), getattr(model, "generation_config", None)]
    values = [call.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


@contextlib.contextmanager
def static_cache_length(handle: PatchHandle) -> Iterator[None]:
    """Give pruned calls a memory of their own: else a long static cache of an unpruned call would be built again."""
    attributes = handle.model.__dict__
    outside = attributes.pop(STATIC_LENGTH, None)
    if handle._static_length is not None:
        attributes[STATIC_LENGTH] = handle._static_length
    try:
        yield
    finally:
        handle._static_length = attributes.pop(STATIC_LENGTH, None)
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


def with_original_prompt(result: Any, prompt: PrunedPrompt) -> Any:
    """Put the original prompt back in front of the generated ids, and the state on the returned cache."""
    sequences = result if torch.is_tensor(result) else result.sequences
    generated = sequences[:, prompt.state.length :]
    ids = prompt.original_ids.to(sequences).repeat_interleave(sequences.shape[0] // prompt.original_ids.shape[0], 0)
    sequences = torch.cat([ids, generated], 1)
    if torch.is_tensor(result):
        return sequences
    result.sequences = sequences
    if getattr(result, "past_key_values", None) is not None:
        remember(result.past_key_values, prompt.state)
    return result
