"""Attention scores from one layer, or several, while the model keeps its own attention and its own masks.

A scored layer's attention module gets a copy of its configuration that names our attention function. That function
calls the one the decoder is set to, reads the scores off beside it where a step asks for them, and returns the
decoder's output unchanged. ``_attn_implementation`` is how transformers picks a module's function, in all versions
we support.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asymvlm.hf.context import Frame, pop, push, top
from asymvlm.hf.errors import MechanismError
from asymvlm_kernels import flash_attn_with_kvcache

NAME = "asymvlm_scores"
BEFORE = "_asymvlm_config"  # where a scored module keeps the configuration it had
WIDEST_HEAD = 256  # that the kernels take


@dataclass(eq=False, kw_only=True)
class Scores(Frame):
    """What one step asks for, and what its scored layers hand out."""

    slot_pos: torch.Tensor  # (B, S) int32, negative = not visible
    q_pos: torch.Tensor  # (B,) column of the step's token
    found: list[torch.Tensor] = field(default_factory=list)  # (B, S) fp32 of each scored layer

    def mean(self) -> torch.Tensor:
        if not self.found:
            raise MechanismError(
                "scoring by attention", "no layer handed out scores: none attends by config._attn_implementation"
            )
        first = self.found[0]
        return first if len(self.found) == 1 else torch.stack([found.to(first.device) for found in self.found]).mean(0)


class Request:
    """The scores that the running step wants, if any.

    torch.compile cannot trace a context variable; while it traces, a plain attribute serves, None again by the end.
    """

    def __init__(self) -> None:
        self._traced: Scores | None = None

    def get(self) -> Scores | None:
        if torch.compiler.is_compiling():
            return self._traced
        frame = top()
        return frame if isinstance(frame, Scores) else None

    def set(self, scores: Scores | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = scores
            return
        if (before := self.get()) is not None:
            pop(before)
        if scores is not None:
            push(scores)


wanted = Request()


def install(modules: Sequence[nn.Module]) -> None:
    """Let the scored layers' attention modules call our function."""
    module: Any
    for module in modules:
        config = copy.copy(module.config)
        config._attn_implementation = {"": NAME}  # a plain string would reach sub-configurations
        module.__dict__[BEFORE] = module.config
        module.config = config


def remove(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        module.config = module.__dict__.pop(BEFORE)


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """The self-attention of each layer that has one, by layer number."""
    layers: Any = decoder.layers
    found = {index: layer.self_attn for index, layer in enumerate(layers) if hasattr(layer, "self_attn")}
    return {index: module for index, module in found.items() if hasattr(module, "config")}


def attend_and_score(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention function of scored layers, with transformers' signature: ``query`` ``(B, H, Q, head_dim)``."""
    implementation = module.__dict__[BEFORE]._attn_implementation  # read anew: a caller may have changed it
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    output = attend(module, query, key, value, attention_mask, *args, **kwargs)
    scores = wanted.get()
    if scores is not None and query.shape[2] == 1:
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores.found.append(score(query, key, scores, scale, kwargs.get("softcap") or 0.0))
    return output


def score(query: torch.Tensor, key: torch.Tensor, step: Scores, scale: float, softcap: float) -> torch.Tensor:
    """Head mean of the step's attention over the slots: ``(B, H, 1, D)``, ``(B, G, S, D)`` -> ``(B, S)`` fp32."""
    query, key = query.detach(), key.detach()
    if query.dtype == torch.float64:  # scores are fp32 anyhow
        query, key = query.float(), key.float()
    slot_pos, q_pos = step.slot_pos.to(key.device), step.q_pos.to(key.device)
    if query.shape[-1] > WIDEST_HEAD:
        rows = query.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, G, H / G, D)
        logits = rows @ key.float().mT * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        visible = (slot_pos >= 0) & (slot_pos <= q_pos[:, None])
        hidden = ~visible[:, None, None]
        # a row that sees nothing is NaN after softmax, and 0 after the second fill
        return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0).mean((1, 2))
    keys = key.transpose(1, 2)
    _, scores = flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys,
        keys,  # in place of the values, whose product nobody reads
        softmax_scale=scale,
        softcap=softcap,
        return_scores=True,
        slot_pos=slot_pos,
        q_pos=q_pos,
    )
    result: torch.Tensor = scores
    return result


AttentionInterface.register(NAME, attend_and_score)
