"""Which kernel calls a patched model will make, from its configuration alone: what `asymvlm warmup` compiles for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asymvlm.hf.heads import attention_heads
from asymvlm.models.adapter import Adapter
from asymvlm_kernels.warming.calls import LENGTHS, Calls, Carried

TYPES = (torch.int64, torch.int32)  # of token types: processors return either


def kernel_calls(
    config: Any,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    weight: Sequence[bool] = (True, False),
    given: bool = False,
    methods: bool = False,
) -> Calls:
    """The calls of a patched model's `generate`: pruning, text eviction, turn eviction.

    Args:
        config: of the model. adapter: the facts of its family.
        dtype: of its weights, and so of embeddings and K/V cache.
        lengths: tokens of the prompts that are to come.
        weight: with a learned scorer, by cosine similarity, or both.
        given: by a method that brings scores of its own too.
        methods: what other methods read and choose by: column sums of attention, and greedy choices among as many
            tokens as ``lengths`` say.
    """
    text: Any = config.get_text_config()
    ids = Carried(pad=getattr(text, "pad_token_id", None) or 0)
    positions = [Carried(rows=3), Carried()] if adapter.mrope else [Carried()]
    kinds = [carried for name in adapter.per_token if name != "labels" for carried in _types(adapter.per_token[name])]
    carry = [(ids, places, *more) for places in positions for more in ((), *((kind,) for kind in kinds))]
    layers, beside = getattr(text, "num_hidden_layers", 0), getattr(text, "hidden_size_per_layer_input", None) or 0
    return Calls(
        width=text.hidden_size,
        dtype=dtype,
        lengths=tuple(lengths),
        weight=tuple(weight),
        protect=(True,),
        carry=tuple(carry),
        given=given,
        sums=methods,
        choices=tuple(lengths) if methods else (),
        by_scores=True,
        stepwise=True,
        gathers=(0, text.hidden_size, *((layers * beside,) if adapter.decoder_rows and beside else ())),
        heads=tuple(sorted(attention_heads(text))),
        softcap=bool(getattr(text, "attn_logit_softcapping", None)),
    )


def _types(pad: int) -> list[Carried]:
    return [Carried(pad, dtype=dtype) for dtype in TYPES]
