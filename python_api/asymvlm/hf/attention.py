"""Attention scores from one layer, or several, while the model keeps its own attention and its own masks.

A scored layer's attention module gets a copy of its configuration that names our attention function. That function
calls the one the decoder is set to, reads the scores off beside it where a step asks for them, and returns the
decoder's output unchanged. ``_attn_implementation`` is how transformers picks a module's function, in all versions
we support.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asymvlm.hf.column_sums import WIDEST_HEAD, Queries, column_sums, heads_as_rows, picked, sum_columns
from asymvlm.hf.context import Frame, pop, push, top
from asymvlm.hf.errors import MechanismError
from asymvlm_kernels import flash_attn_with_kvcache

NAME = "asymvlm_scores"
BEFORE = "_asymvlm_config"  # where a scored module keeps the configuration it had
NUMBER = "_asymvlm_layer"  # and the number of its layer


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a layer lie: one line for each row of the batch, or for each K/V head of each row."""

    slot_pos: torch.Tensor  # (lines, S) int32, negative = not visible
    q_pos: torch.Tensor  # (lines,) column of the step's token
    heads: int = 1  # lines of a row
    queries: torch.Tensor | None = None  # (B, n) tokens of the step that score, -1 for none; None: its only one
    query_pos: torch.Tensor | None = None  # (B, n) where they stand among ``slot_pos``; None: ``queries``
    per_head: bool = False  # ``queries`` score for each query head, (B, H, S), not for their mean


@dataclass(eq=False, kw_only=True)
class Step(Frame):
    """What one step asks its layers for, and what they hand out, by number of layer."""

    places: Mapping[int, Places | Queries] = field(default_factory=dict)  # of the layers that are to score
    masks: Mapping[int, Any] = field(default_factory=dict)  # to attend by instead of the decoder's
    found: dict[int, torch.Tensor] = field(default_factory=dict)  # (lines, S) fp32 of each scored layer
    due: bool = False  # tokens are to be evicted behind it
    scores_only: bool = False  # `Reached` is raised in place of attending
    masked: set[int] = field(default_factory=set)  # layers that attended by a mask of their own

    def mean(self) -> torch.Tensor:
        """Of all layers that scored."""
        self.check()
        found = list(self.found.values())
        return found[0] if len(found) == 1 else torch.stack([one.to(found[0].device) for one in found]).mean(0)

    def check(self) -> None:
        """Raise a MechanismError where a layer did not do what the step asked of it."""
        if self.found.keys() != self.places.keys() or self.masked != self.masks.keys():
            missing = sorted({*self.places} - {*self.found} | {*self.masks} - self.masked)
            raise MechanismError(
                "scoring by attention", f"layers {missing} handed out none: do they attend by _attn_implementation?"
            )


class Reached(Exception):
    """A step of ``scores_only`` has its scores."""


class Request:
    """What the running step asks for, if anything.

    torch.compile cannot trace a context variable; while it traces, a plain attribute serves, None again by the end.
    """

    def __init__(self) -> None:
        self._traced: Step | None = None

    def get(self) -> Step | None:
        if torch.compiler.is_compiling():
            return self._traced
        frame = top()
        return frame if isinstance(frame, Step) else None

    def set(self, step: Step | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = step
            return
        if (before := self.get()) is not None:
            pop(before)
        if step is not None:
            push(step)


wanted = Request()


def install(modules: Mapping[int, nn.Module]) -> None:
    """Let the attention modules of layers, by number, call our function."""
    module: Any
    for number, module in modules.items():
        config = copy.copy(module.config)
        config._attn_implementation = {"": NAME}  # a plain string would reach sub-configurations
        module.__dict__[BEFORE], module.__dict__[NUMBER] = module.config, number
        module.config = config


def remove(modules: Mapping[int, nn.Module]) -> None:
    for module in modules.values():
        module.config = module.__dict__.pop(BEFORE)
        del module.__dict__[NUMBER]


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
    step, number = wanted.get(), module.__dict__[NUMBER]
    if step is not None and number in step.masks:
        attention_mask = _for_heads(step.masks[number], query.shape[1])
        step.masked.add(number)
    if step is not None and step.scores_only:
        _read_off(step, number, query, key, kwargs)
        raise Reached
    implementation = module.__dict__[BEFORE]._attn_implementation  # read anew: a caller may have changed it
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    output = attend(module, query, key, value, attention_mask, *args, **kwargs)
    if step is not None:
        _read_off(step, number, query, key, kwargs)
    return output


def _read_off(step: Step, number: int, query: torch.Tensor, key: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """The scores of a layer, where the step asks for them."""
    places = step.places.get(number)
    if places is None:
        return
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("scores of attention with learned sinks beside the keys are not known here")
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap") or 0.0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(places, Queries):
        step.found[number] = sum_columns(query, key, places, scale, softcap)
    elif places.queries is not None:
        step.found[number] = score_rows(query, key, places, scale, softcap, kwargs.get("sliding_window"))
    elif query.shape[2] == 1:
        step.found[number] = score(query, key, places, scale, softcap)


def _for_heads(mask: Any, heads: int) -> Any:
    """A mask ``(B, K/V heads, queries, slots)`` for as many query heads."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] in (1, heads):
        return mask
    return mask.repeat_interleave(heads // mask.shape[1], 1)


def score_rows(
    query: torch.Tensor, key: torch.Tensor, places: Places, scale: float, softcap: float, window: int | None = None
) -> torch.Tensor:
    """Mean over chosen tokens of the step of the attention of each to what is in front of it.

    Args:
        query: ``(B, H, Q, D)``. key: ``(B, G, S, D)``.
        window: how many tokens of the prompt, its own with them, a query sees; None for all.
    Returns:
        ``(B, S)`` fp32, the mean over heads too, or ``(B, H, S)`` where ``places`` wants each head.
    """
    assert places.queries is not None
    chosen, query, key = places.queries, query.detach(), key.detach()
    if places.per_head:  # a K/V head for each query head: sums are over those of a K/V head
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    standing = (chosen if places.query_pos is None else places.query_pos).to(key.device)
    slot_pos = places.slot_pos.to(key.device)
    sums = column_sums(picked(query, chosen), key, standing, slot_pos, scale, softcap, window)
    means = sums / (chosen >= 0).sum(1).clamp_min(1).to(sums.device)[:, None, None]
    return means if places.per_head else means.mean(1)


def score(query: torch.Tensor, key: torch.Tensor, places: Places, scale: float, softcap: float) -> torch.Tensor:
    """Mean over heads of the step's attention: ``(B, H, 1, D)``, ``(B, G, S, D)`` -> ``(lines, S)`` fp32."""
    query, key = query.detach(), key.detach()
    if places.heads > 1:
        query, key = heads_as_rows(query, key)
    slot_pos, q_pos = places.slot_pos.to(key.device), places.q_pos.to(key.device)
    if query.shape[-1] > WIDEST_HEAD:
        return column_sums(query, key, q_pos[:, None], slot_pos, scale, softcap).mean(1)
    if query.dtype == torch.float64:  # scores are fp32 anyhow
        query, key = query.float(), key.float()
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
