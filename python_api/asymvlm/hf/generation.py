"""`generate` as transformers has it: settings in effect, the mask it infers, what it remembers, streamers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import IDS, Callee

STATIC_LENGTH = "_previous_max_cache_length"  # where transformers remembers the longest static cache of an instance


_lengths = threading.Lock()  # of what models remember; module-wide, so that handles can be copied and pickled


def generate_callee(model: nn.Module) -> Callee:
    """How ``model.generate`` is called: what it does not name itself it hands on to the model's forward."""
    cls: Any = type(model)
    return Callee.of(cls.prepare_inputs_for_generation, cls.forward)


def infer_attention_mask(model: nn.Module, call: Mapping[str, Any]) -> torch.Tensor:
    """The mask `generate` makes when none is given: padding is where the pad id stands, unless it also ends a text."""
    input_ids: torch.Tensor = call[IDS]
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
    running: int = 0  # pruned calls of several threads at once
    outside: int | None = None  # what the model remembered before the first of them

    @contextlib.contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """For the time of a block, the model remembers this length instead of its own."""
        attributes = model.__dict__
        with _lengths:
            self.running += 1
            if self.running == 1:
                self.outside = attributes.pop(STATIC_LENGTH, None)
                if self.length is not None:
                    attributes[STATIC_LENGTH] = self.length
        try:
            yield
        finally:
            with _lengths:
                self.running -= 1
                if self.running == 0:
                    self.length = attributes.pop(STATIC_LENGTH, None)
                    if self.outside is not None:
                        attributes[STATIC_LENGTH] = self.outside


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
