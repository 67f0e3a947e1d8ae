"""Merged embeddings without decoder work: the model's own code runs, its decoder only records.

The composite of a family embeds the ids, runs the vision tower, writes the features over the placeholders and works out
positions and masks. Its decoder's ``forward`` is swapped for a recorder on the instance for the length of that call.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from asymvlm.hf.arguments import CACHE, EMBEDS, USE_CACHE, read
from asymvlm.hf.context import Frame, entered, top
from asymvlm.hf.errors import MechanismError
from asymvlm.models.adapter import ENCODED, Adapter, Inputs

NOT_FOR_THE_MERGE = (CACHE, USE_CACHE, "labels", "output_attentions", "output_hidden_states")
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


@dataclass(eq=False, kw_only=True)
class Recording(Frame):
    """A merge in hand: the arguments that the decoder was called with, under our names."""

    arguments: dict[str, Any] = field(default_factory=dict)
    calls: int = 0


def merging() -> bool:
    """Whether the decoder is called to be recorded, not to run."""
    return isinstance(top(), Recording)


def merge_embeddings(model: nn.Module, adapter: Adapter, inputs: Inputs) -> dict[str, Any]:
    """Run the composite up to its decoder and return what the decoder would have been called with.

    Args:
        model: the top model, whose ``adapter.composite`` merges.
        inputs: keyword inputs of the top model; None values and those for the decoder alone are left out.
    Returns:
        The decoder's keyword arguments: ``inputs_embeds`` ``(B, S, D)``, and what else the family computes
        (``position_ids``, masks, DeepStack features). No gradient is recorded.
    """
    if adapter.merge is not None:
        if inputs.get(ENCODED):
            raise NotImplementedError(f"{adapter.model_type} merges its images itself: pass pixels, not {ENCODED}")
        with torch.no_grad():
            return adapter.merge(model, inputs)
    composite = adapter.composite_of(model)
    accepted = inspect.signature(type(composite).forward).parameters
    kwargs = {
        name: value
        for name, value in inputs.items()
        if name in accepted and value is not None and name not in NOT_FOR_THE_MERGE
    }
    brought = [name for name in (*adapter.triggers, ENCODED) if inputs.get(name) is not None]
    unknown = [name for name in brought if name not in kwargs]
    if unknown:
        raise ValueError(f"{type(composite).__name__} takes no {', '.join(unknown)}: its images would be lost")
    with torch.no_grad(), _recorder(adapter.text_of(model)) as recording:
        composite(**kwargs)
    if recording.calls != 1 or recording.arguments.get(EMBEDS) is None:
        raise MechanismError(
            "merging images into the embeddings",
            f"{type(composite).__name__} called its decoder {adapter.text!r} {recording.calls} times, and "
            f"{'with' if EMBEDS in recording.arguments else 'without'} {EMBEDS}, wanted once with them",
        )
    return recording.arguments


class _Recorded(BaseModelOutputWithPast):
    """What the recorder returns: None for whatever else a family's composite reads from its decoder."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _recorder(text: nn.Module) -> Iterator[Recording]:
    with _locks_lock:
        lock = _locks.setdefault(text, threading.RLock())
    with lock:
        original = text.forward
        previous = text.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            if top() is not recording:  # another thread decodes meanwhile
                return original(*args, **kwargs)
            recording.arguments.update(read(kwargs))
            recording.calls += 1
            return _Recorded(last_hidden_state=kwargs.get(EMBEDS))

        recording = Recording()
        text.__dict__["forward"] = forward
        try:
            with entered(recording):
                yield recording
        finally:
            if previous is None:
                del text.__dict__["forward"]
            else:
                text.__dict__["forward"] = previous
