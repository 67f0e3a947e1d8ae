"""One call in flight on a patched model, and the merged embeddings it hands to the prefill inside `generate`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from asymvlm.prompt import PrunedPrompt
from asymvlm.report import PruningReport


@dataclass(eq=False)
class Call:
    """It lives in a context variable, so threads do not see each other's, and dies with the call."""

    owner: object  # the handle whose model is called
    report: PruningReport | None
    prompt: PrunedPrompt | None  # None: the call is left alone and only its cache is measured
    phase: str  # "prefill", "measure" (its last chunk runs), "decode"; "forward" for a plain call
    outer: Call | None = None  # the call, of another patched model, that this one runs inside


_current: ContextVar[Call | None] = ContextVar("asymvlm_call", default=None)


def current_call() -> Call | None:
    return _current.get()


def set_call(call: Call | None) -> None:
    _current.set(call)


@contextlib.contextmanager
def in_flight(call: Call) -> Iterator[None]:
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def feed_prompt(model: nn.Module, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inside `generate`: swap the prompt ids of this (chunk of the) prefill for the merged embeddings."""
    assert call.prompt is not None
    input_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    prompt_length = call.prompt.state.length
    if input_ids is None or past >= prompt_length:
        return kwargs
    cached = call.prompt.cached
    if past < cached:
        raise NotImplementedError(
            f"the cache of {cached} tokens was given up (LongRoPE beyond its switch), and their embeddings are gone: "
            "pass the whole conversation without a cache"
        )
    end = past + input_ids.shape[1]
    repeats = input_ids.shape[0] // call.prompt.inputs["inputs_embeds"].shape[0]  # beams, num_return_sequences
    rows = {"inputs_embeds": cast("Any", model).get_input_embeddings()}
    rows |= {name: functools.partial(more, model) for name, more in call.prompt.decoder_rows.items()}
    embeds = {}
    for name, more in rows.items():
        embeds[name] = call.prompt.inputs[name].repeat_interleave(repeats, 0)[:, past - cached : end - cached]
        if end > prompt_length:  # no cache, or drafted tokens behind the prompt
            generated = more(input_ids[:, prompt_length - past :])
            embeds[name] = torch.cat([embeds[name], generated.to(embeds[name].dtype)], 1)
    if cache is not None and end >= prompt_length:
        call.phase = "measure"
    fed = {name: value for name, value in kwargs.items() if name != "input_ids"}
    for name in call.prompt.whole_rows:
        fed[name] = call.prompt.inputs[name].repeat_interleave(repeats, 0)[:, :end]
    if cache is None and kwargs.get("attention_mask") is None:
        fed["attention_mask"] = torch.ones_like(input_ids)  # gapped positions without a mask are read as packed
    return {**fed, **{name: tensor.contiguous() for name, tensor in embeds.items()}}
