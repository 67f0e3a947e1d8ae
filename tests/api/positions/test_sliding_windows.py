"""Sliding windows must reach as far back as in the unpruned sequence: they measure positions, not kept tokens."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers
from checks import GREEDY, assert_close, assert_kept_logits, set_tolerance, uniform
from masked_reference import masked_forward, masked_greedy, select
from packaging.version import Version

import asymvlm

# masks by layer kind from the composite, from the decoder, one mask for all layers, and prefix attention
SLIDING = {
    "gemma3": dict(),
    "gemma4": dict(),
    "aya_vision": dict(),
    "mistral3": dict(),
    "llama4": dict(),  # chunks
    "paligemma": dict(
        attention="eager",  # all that Gemma 2 supports
        model_type="gemma2",
        num_hidden_layers=4,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=None,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


@pytest.fixture(scope="module", params=[(name, window) for name in SLIDING for window in (12, 30)], ids=str)
def windowed(request):
    """A family with windows shorter than the prompt."""
    name, window = request.param
    if tiny.FAMILIES[name].broken:
        pytest.skip(f"the unpatched model fails here: {tiny.FAMILIES[name].broken}")
    width = "attention_chunk_size" if name == "llama4" else "sliding_window"
    return name, tiny.build(name, **{width: window}, **SLIDING[name])


@pytest.mark.parametrize("batch", ["single", "left_padded", "right_padded"])
def test_forward(windowed, batch):
    family, model = windowed
    set_tolerance(tiny.FAMILIES[family].atol)
    inputs = tiny.make_batch(family, batch)
    selection = select(model, inputs, 0.5)
    with torch.no_grad(), asymvlm.patch(copy.deepcopy(model), vision=uniform(0.5)) as handle:
        found = handle.model(**inputs).logits
    assert_kept_logits(found, masked_forward(model, inputs, selection.keep), selection)


@pytest.mark.parametrize("batch", ["single", "left_padded"])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation(windowed, batch, cache):
    family, model = windowed
    set_tolerance(tiny.FAMILIES[family].atol)
    if cache and family == "paligemma":
        pytest.skip("PaliGemma 2 without a growing cache fails or answers differently without any patch")
    old = Version(transformers.__version__) < Version("5.23")
    if "cache_implementation" in cache and family in ("gemma4", "llama4") and old:
        pytest.skip("the unpatched model fails or answers differently with a static cache")
    inputs = tiny.make_batch(family, batch)
    ids, logits = masked_greedy(model, inputs, select(model, inputs, 0.5).keep, steps=8)
    with asymvlm.patch(copy.deepcopy(model), vision=uniform(0.5)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, **cache, max_new_tokens=8)
    assert torch.equal(found.sequences[:, -8:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_the_reference_sees_the_windows_of_the_plain_model(windowed, batch):
    family, model = windowed
    set_tolerance(tiny.FAMILIES[family].atol)
    inputs = tiny.make_batch(family, batch)
    _, logits = masked_greedy(model, inputs, torch.ones_like(inputs["input_ids"]).bool(), steps=8)
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert_close(torch.stack(expected.logits, 1), logits)
