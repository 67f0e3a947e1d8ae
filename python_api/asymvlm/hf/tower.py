"""What the vision tower hands out while a prompt is merged, read off beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from asymvlm.hf.context import Frame, entered, innermost
from asymvlm.hf.errors import MechanismError
from asymvlm.models.adapter import Adapter


@dataclass(eq=False, kw_only=True)
class TowerOutputs(Frame):
    """The outputs of a tower's forwards in this thread or task, in order."""

    found: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def tower_outputs(model: nn.Module, adapter: Adapter) -> Iterator[TowerOutputs]:
    """Collect what the tower returns inside a block. The hook is the module's only while the block runs."""
    outputs = TowerOutputs()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if innermost(TowerOutputs) is outputs:  # another thread may run the tower meanwhile
            outputs.found.append(output)

    hook = model.get_submodule(adapter.tower).register_forward_hook(keep)
    try:
        with entered(outputs):
            yield outputs
    finally:
        hook.remove()


def hidden_states(config: Any, output: Any) -> torch.Tensor:
    """The hidden states that the projector reads: of the layer that the model's config names, or the last.

    Raises:
        MechanismError: if a tower's output has none.
    """
    layer, states = getattr(config, "vision_feature_layer", None), getattr(output, "hidden_states", None)
    if isinstance(layer, int) and states:
        found = states[layer]
    else:
        found = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(found, torch.Tensor):
        raise MechanismError("reading the vision tower", f"a {type(output).__name__} came without hidden states")
    return found.detach()
