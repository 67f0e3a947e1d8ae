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
from asymvlm.models.tower_attention import TowerLayer
from asymvlm_kernels import attention_column_sums


@dataclass(frozen=True, eq=False)
class PatchAttention:
    """What one layer of a tower attends to, by patch: ``(pictures, patches)`` where pictures are alike, a class token
    in front included, else ``(patches,)`` over all of them."""

    attention: torch.Tensor  # fp32, (..., patches): mean over the heads of the rows that look
    keys: torch.Tensor  # (..., patches, Dk): mean over the heads, before a rotation


@dataclass(eq=False, kw_only=True)
class TowerOutputs(Frame):
    """What a tower's forwards in this thread or task handed out, in order."""

    found: list[Any] = field(default_factory=list)
    attention: list[PatchAttention] = field(default_factory=list)
    projected: dict[str, torch.Tensor] = field(default_factory=dict)  # of the forward that runs


@contextlib.contextmanager
def tower_outputs(model: nn.Module, adapter: Adapter, *, attention: bool = False) -> Iterator[TowerOutputs]:
    """Collect what the tower returns inside a block. The hooks are the modules' only while the block runs.

    Args:
        attention: collect what its layer attends to as well.
    Raises:
        NotImplementedError: if that is wanted of a tower whose attention cannot be read.
    """
    outputs = TowerOutputs()
    layer = _layer(model, adapter) if attention else None

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if innermost(TowerOutputs) is outputs:  # another thread may run the tower meanwhile
            outputs.found.append(output)

    with contextlib.ExitStack() as hooks:
        hook = model.get_submodule(adapter.tower).register_forward_hook(keep)
        hooks.callback(hook.remove)
        if layer is not None:
            _watch(layer, outputs, hooks)
        hooks.enter_context(entered(outputs))
        yield outputs


def _layer(model: nn.Module, adapter: Adapter) -> TowerLayer:
    if adapter.tower_attention is None:
        raise NotImplementedError(
            f"the {adapter.model_type} adapter does not say where its vision tower attends: methods that read "
            "prompt.tower_attention or prompt.tower_keys cannot serve it"
        )
    return adapter.tower_attention(model)


def _watch(layer: TowerLayer, outputs: TowerOutputs, hooks: contextlib.ExitStack) -> None:
    """Hooks that read a layer's queries and keys and keep what comes of them."""

    def collect(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if innermost(TowerOutputs) is outputs:
                outputs.projected[name] = output.detach()

        return hook

    def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if innermost(TowerOutputs) is not outputs:
            return
        outputs.attention.append(_patch_attention(layer, [outputs.projected[p] for p in layer.projections], kwargs))
        outputs.projected.clear()

    for name in layer.projections:
        hooks.callback(layer.attention.get_submodule(name).register_forward_hook(collect(name)).remove)
    hooks.callback(layer.attention.register_forward_hook(read, with_kwargs=True).remove)


def _patch_attention(layer: TowerLayer, projected: list[torch.Tensor], kwargs: Any) -> PatchAttention:
    seen, keys = [], []
    for query, key, raw in layer.read(projected, kwargs):
        if layer.has_class_token(key.shape[1]):
            seen.append(class_attention(query[:, 0], key, layer.scale))
        else:
            seen.append(mean_attention(query, key, layer.scale))
        keys.append(raw.mean(2))
    if len(seen) == 1:
        return PatchAttention(seen[0], keys[0])
    return PatchAttention(torch.cat([one.flatten() for one in seen]), torch.cat([one.flatten(0, 1) for one in keys]))


def class_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What a class token attends to: ``(P, H, Dk)``, ``(P, patches, H, Dk)`` -> ``(P, patches)`` fp32, head mean."""
    logits = torch.einsum("phd,pshd->phs", query.float() * scale, key.float())
    return logits.softmax(-1).mean(1)


def mean_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What patches attend to on average, over rows and heads: ``(P, patches, H, Dk)`` twice -> ``(P, patches)``."""
    if query.dtype == torch.float64:  # the kernels' widest is fp32
        query, key = query.float(), key.float()
    pictures, patches = query.shape[:2]
    last = torch.full((pictures, patches), patches - 1, device=query.device)  # every patch sees all of them
    return attention_column_sums(query, key, q_pos=last, softmax_scale=scale).mean(1) / patches


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
