"""Adding a bias to the attention logits of every layer and head, for decoders whose code knows nothing of it.

The decoder's modules get copies of their configuration that name our attention function, so that masks, too, are made
by ours: as additive 4-D masks, or, where the model's own mask is causal with padding and nothing else, as the per-key
bias itself, which a kernel adds without a mask of S x S. Both reach the layers as ``attention_mask``, so a checkpointed
layer sees the same input when it runs again, on whatever thread that is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from asymvlm.hf.arguments import MASK
from asymvlm.hf.context import Frame, entered, innermost
from asymvlm.hf.text_rows import Remembering, TextRows
from asymvlm_kernels.training.attention import WIDEST, key_bias_attention

NAME = "asymvlm_key_bias"
INJECTIONS = ("mask", "bias")


@dataclass(frozen=True, eq=False)
class KeyBias:
    """What is added to the logits of one pass."""

    bias: torch.Tensor  # (B, S) fp32, 0 where nothing is added
    injection: str  # "mask" or "bias"

    def join(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the layers get for a ``(B, 1, S, S)`` mask, bool or additive: a 4-D additive mask, or ``(B, S)``."""
        if mask.dtype != torch.bool:
            return mask + self.bias[:, None, None].to(mask.dtype)
        if self.injection == "bias":
            real = mask[:, 0, -1]  # the last query of a causal mask sees every real key
            if bool((mask[:, 0] == causal(mask.shape[-1], mask.device) & real[:, None]).all()):
                return self.bias.masked_fill(~real, float("-inf"))
        return torch.where(mask, self.bias[:, None, None].to(dtype), torch.finfo(dtype).min)


@dataclass(eq=False, kw_only=True)
class Pass(Frame):
    """A pass under a bias."""

    key_bias: KeyBias


@contextlib.contextmanager
def biased(key_bias: KeyBias) -> Iterator[None]:
    """Masks made inside the context carry this bias."""
    with entered(Pass(key_bias=key_bias)):
        yield


@contextlib.contextmanager
def own_attention(decoder: nn.Module) -> Iterator[None]:
    """Inside the context the decoder attends by our function; afterwards every module has its own configuration back.

    It has to span the backward pass: a checkpointed layer is run again there.
    """
    modules = [decoder, *(module for layer in cast("Any", decoder).layers for module in layer.modules())]
    configured = [module for module in modules if "config" in module.__dict__]
    before = [module.__dict__["config"] for module in configured]
    copies: dict[int, Any] = {}
    try:
        for module, config in zip(configured, before, strict=True):
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                # as a dict it stays out of sub-configurations, which the copy shares with the original
                copies[id(config)]._attn_implementation = {"": NAME}
            module.__dict__["config"] = copies[id(config)]
        yield
    finally:
        for module, config in zip(configured, before, strict=True):
            module.__dict__["config"] = config


def causal(length: int, device: torch.device) -> torch.Tensor:
    """``(S, S)`` bool, True where key <= query."""
    places = torch.arange(length, device=device)
    return places[:, None] >= places


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: ``(B, H, S, head_dim)`` in, ``(B, S, H, head_dim)`` out.

    ``attention_mask`` is what `make_mask` or `KeyBias.join` made. No dropout: a frozen model is deterministic. In a
    pass of text rows (`TextRows`) queries are those of the rows, and keys, values and mask of all columns.
    """
    if (rows := innermost(TextRows)) is not None:
        key, value, attention_mask = rows.joined(module, key, value)
    elif (remembering := innermost(Remembering)) is not None:
        remembering.take(module, key, value, attention_mask)
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__} has attention sinks, which scorer training does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap")
    if attention_mask is None:
        attention_mask = torch.zeros(1, query.shape[2], device=query.device)
    if attention_mask.ndim == 2:
        plain = softcap is None and value.shape[-1] == key.shape[-1] <= WIDEST
        if plain:
            wide = torch.promote_types(query.dtype, torch.float32)
            q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return key_bias_attention(q, k, v, attention_mask.to(wide), scale=scale), None
        open_ = causal(query.shape[2], query.device)
        attention_mask = torch.where(open_, attention_mask[:, None, None], float("-inf"))
        attention_mask = attention_mask.clamp_min(torch.finfo(query.dtype).min).to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scale)
    else:
        logits = torch.tanh(query @ key.mT * (scale / softcap)) * softcap
        if attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + attention_mask
        out = logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


def make_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    """A mask function of transformers: the model's own mask, with the bias of the pass on top if one is running."""
    if (rows := innermost(TextRows)) is not None:  # `attend` has the whole pass's masks
        return torch.zeros(*rows.index.shape, rows.index.shape[1], dtype=dtype, device=rows.index.device)[:, None]
    running, padding = innermost(Pass), kwargs.get(MASK)
    key_bias = None if running is None else running.key_bias
    if key_bias is not None and key_bias.injection == "bias" and kwargs.get("mask_function") is causal_mask_function:
        # no S x S mask at all; the passes run without a cache, so queries and keys are the same places
        return key_bias.bias if padding is None else key_bias.bias.masked_fill(~padding.bool(), float("-inf"))
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask if key_bias is None else key_bias.join(mask, dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
