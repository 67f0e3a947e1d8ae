"""Merged embeddings without decoder work: the model's own code runs, its decoder only records.

The composite of a family embeds the ids, runs the vision tower, writes the features over the placeholders and works out
positions and masks. Its decoder's ``forward`` is swapped for a recorder on the instance for the length of that call.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from asymvlm.models.adapter import Adapter, Inputs

NOT_FOR_THE_MERGE = ("past_key_values", "use_cache", "labels", "output_attentions", "output_hidden_states")
_recording: ContextVar[dict[str, Any] | None] = ContextVar("asymvlm_recording", default=None)
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def merging() -> bool:
    """Whether the decoder is called to be recorded, not to run."""
    return _recording.get() is not None


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
        with torch.no_grad():
            return adapter.merge(model, inputs)
    composite = adapter.composite_of(model)
    accepted = inspect.signature(type(composite).forward).parameters
    kwargs = {
        name: value
        for name, value in inputs.items()
        if name in accepted and value is not None and name not in NOT_FOR_THE_MERGE
    }
    unknown = [name for name in adapter.triggers if inputs.get(name) is not None and name not in kwargs]
    if unknown:
        raise ValueError(f"{type(composite).__name__} takes no {', '.join(unknown)}: its images would be lost")
    with torch.no_grad(), _recorder(adapter.text_of(model)) as record:
        composite(**kwargs)
    if "inputs_embeds" not in record:
        raise RuntimeError(
            f"{type(composite).__name__}.{adapter.text} was not called with inputs_embeds: "
            f"the adapter of {adapter.model_type!r} does not fit this transformers version"
        )
    return record


class _Recorded(BaseModelOutputWithPast):
    """What the recorder returns: None for whatever else a family's composite reads from its decoder."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _recorder(text: nn.Module) -> Iterator[dict[str, Any]]:
    with _locks_lock:
        lock = _locks.setdefault(text, threading.RLock())
    with lock:
        original = text.forward
        previous = text.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            record = _recording.get()
            if record is None:  # another thread decodes meanwhile
                return original(*args, **kwargs)
            record.update(kwargs)
            return _Recorded(last_hidden_state=kwargs["inputs_embeds"])

        record: dict[str, Any] = {}
        token = _recording.set(record)
        text.__dict__["forward"] = forward
        try:
            yield record
        finally:
            if previous is None:
                del text.__dict__["forward"]
            else:
                text.__dict__["forward"] = previous
            _recording.reset(token)
