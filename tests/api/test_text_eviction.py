"""Evicting a token must equal masking it from then on: same tokens, logits within 1e-4, in every way to decode."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, uniform
from evicted_reference import Masked
from masked_reference import select

import asymvlm
from asymvlm import TextEviction

FAMILIES = ("llava", "gemma3", "phi3_v", "qwen2_5_vl")
ATOL = 1e-4
STATIC = {"cache_implementation": "static"}


@functools.cache
def windowed(family: str):
    """Gemma 3 with windows that the answers leave."""
    return tiny.build(family, **({"sliding_window": 20} if family == "gemma3" else {}))


def check(family, policy: dict, steps: int, batch="left_padded", vision=None, **options):
    """Generate ``steps`` tokens both ways; the patched result and the reference."""
    model = windowed(family)
    inputs = tiny.make_batch(family, batch)
    keep = None if vision is None else select(model, inputs, vision).keep
    reference = Masked(model, inputs, keep, **policy)
    ids, logits = reference.generate(steps)
    pruning = {} if vision is None else {"vision": uniform(vision)}
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction(**policy), **pruning) as handle:
        found = handle.model.generate(**inputs, **GREEDY, **options, max_new_tokens=steps)
    assert torch.equal(found.sequences[:, -steps:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
    report = handle.last.eviction
    assert report.evicted == [len(row) for row in reference.evicted]
    assert len({tuple(row) for row in reference.evicted}) > 1, "rows must evict different tokens, or nothing is shown"
    held = len(reference.generated) - len(reference.evicted[0])
    assert report.cache.held == [held] * len(ids)
    return found, reference


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_thirty_two_evictions_in_forty_steps(family, cache):
    check(family, dict(threshold=7, retention=1.0), steps=40, **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_bulk_evictions_with_pruning_at_a_half(family, cache):
    check(family, dict(threshold=9, retention=0.5), steps=24, batch="one_image_each", vision=0.5, **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("sliding", ["keep", "mask"])
@pytest.mark.parametrize("vision", [None, 0.5], ids=["whole", "pruned"])
def test_sliding_layers_keep_or_lose_evicted_tokens(cache, sliding, vision):
    policy = dict(threshold=6, retention=0.5, sliding=sliding)
    check("gemma3", policy, steps=24, vision=vision, batch="one_image_each", **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("policy", [
    dict(threshold=6, retention=0.5, mode="proportional"),
    dict(threshold=8, retention=0.75, recent=5),
    dict(threshold=6, retention=0.5, layers="all"),
    dict(threshold=2, retention=0.5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_modes(family, policy, cache):
    check(family, policy, steps=20, **cache)


@pytest.mark.parametrize("attention", ["eager"])
@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_eager_attention(family, attention, cache):
    model, policy, inputs = windowed(family), dict(threshold=6, retention=0.5), tiny.make_batch(family, "left_padded")
    ids, logits = Masked(model, inputs, **policy).generate(16)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation(attention)
    with asymvlm.patch(eager, text=TextEviction(**policy)):
        found = eager.generate(**inputs, **GREEDY, **cache, max_new_tokens=16)
    assert torch.equal(found.sequences[:, -16:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
