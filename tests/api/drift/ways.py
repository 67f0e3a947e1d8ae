"""The ways to call a patched model that drift is simulated in, each with its right answer."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from checks import GREEDY, uniform
from tiny import build, make_batch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

import asymvlm
from asymvlm import TextEviction

FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "phi3_v", "qwen3_vl")
BOTH = ("cache", "past_key_values")
NATIVE = next(name for name in BOTH if name in inspect.signature(LlavaForConditionalGeneration.forward).parameters)
FOREIGN = next(name for name in BOTH if name != NATIVE)
PRUNED, EVICTED = {"vision": uniform(0.5)}, {"text": TextEviction.paper(3, 0.5)}
STATIC = {"cache_implementation": "static"}
Answer = list[Tensor]
Drift = Callable[[PreTrainedModel], None]


def generated(result: Any) -> Answer:
    return [result.sequences, torch.stack(result.logits, 1)]


def generate(model: PreTrainedModel, batch: str = "left_padded", **options: Any) -> Answer:
    inputs = make_batch(model.test_family, batch)
    return generated(model.generate(**inputs, **{**GREEDY, "max_new_tokens": 5, **options}))


def sample(model: PreTrainedModel) -> Answer:
    torch.manual_seed(3)
    return generate(model, do_sample=True, top_k=8)


def forward(model: PreTrainedModel) -> Answer:
    with torch.no_grad():
        return [model(**make_batch(model.test_family, "left_padded"), use_cache=True).logits]


def loop(model: PreTrainedModel, key: str = NATIVE, batch: str = "left_padded", turns: int = 4) -> Answer:
    """A decode loop of the caller's own, which thinks in original lengths."""
    call, logits = make_batch(model.test_family, batch), []
    mask = call["attention_mask"]
    for _ in range(turns):
        with torch.no_grad():
            out = model(**call, use_cache=True)
        logits.append(out.logits[:, -1])
        mask = nn.functional.pad(mask, (0, 1), value=1)
        call = {"input_ids": logits[-1].argmax(-1, keepdim=True), "attention_mask": mask, key: out[NATIVE]}
    return [torch.stack(logits, 1)]


def turn(model: PreTrainedModel, key: str = NATIVE) -> Answer:
    """A second turn on the cache of the first; what a drift does to the first one is the matter of the other ways."""
    inputs = make_batch(model.test_family, "left_padded")
    first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    return generated(model.generate(**second_turn(inputs, first), **{key: first[NATIVE]}, **GREEDY, max_new_tokens=4))


def second_turn(inputs: dict[str, Tensor], first: Any) -> dict[str, Tensor]:
    """The whole conversation with a question of three tokens behind the first answer."""
    ids = torch.cat([first.sequences, torch.tensor([[21, 22, 23]] * len(first.sequences))], 1)
    grown = {"input_ids": ids}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            pad = ids.shape[1] - inputs[name].shape[1]
            grown[name] = nn.functional.pad(inputs[name], (0, pad), value=int(name == "attention_mask"))
    return grown


def evict(model: PreTrainedModel) -> Answer:
    return generate(model, max_new_tokens=9)


WAYS: dict[str, tuple[dict[str, Any], Callable[[PreTrainedModel], Answer]]] = {
    "generate": (PRUNED, generate),
    "forward": (PRUNED, forward),
    "loop": (PRUNED, loop),
    "turn": (PRUNED, turn),
    "evict": (EVICTED, evict),
    "evict_static": (EVICTED, functools.partial(generate, max_new_tokens=9, **STATIC)),
    "evict_pruned": (PRUNED | EVICTED, evict),
    "sample": (PRUNED, sample),
    "beams": (PRUNED, lambda model: generate(model, num_beams=2)),
    "static": (PRUNED, functools.partial(generate, **STATIC)),
    "lookup": (PRUNED, functools.partial(generate, batch="single", prompt_lookup_num_tokens=2)),
}


@functools.cache
def built(family: str) -> PreTrainedModel:
    return build(family)


def fresh(family: str) -> PreTrainedModel:
    model = copy.deepcopy(built(family))
    model.test_family = family
    return model


@functools.cache
def right(family: str, way: str) -> Answer:
    """The answer where nothing drifts; that it is right is what the other test modules show."""
    settings, call = WAYS[way]
    model = fresh(family)
    with asymvlm.patch(model, **settings):
        return call(model)


def drifted(family: str, way: str, before: Drift | None = None, after: Drift | None = None) -> Answer:
    """The answer of a model that drifted before it was patched, or after."""
    settings, call = WAYS[way]
    model = fresh(family)
    if before is not None:
        before(model)
    with asymvlm.patch(model, **settings):
        if after is not None:
            after(model)
        return call(model)


def assert_right(family: str, way: str, found: Answer) -> None:
    for tensor, expected in zip(found, right(family, way), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-4)
