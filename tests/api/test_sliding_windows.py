"""Sliding windows must reach as far back as in the unpruned sequence: they measure positions, not kept tokens."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_greedy, select

import asymvlm


@pytest.fixture(scope="module", params=[12, 30], ids="window {}".format)
def windowed(request):
    """Gemma 3 with windows shorter than the prompt."""
    return tiny.build("gemma3", sliding_window=request.param)


@pytest.mark.parametrize("batch", ["single", "two_images", "left_padded", "right_padded"])
def test_forward(windowed, batch):
    inputs = tiny.make_batch("gemma3", batch)
    selection = select(windowed, inputs, 0.5)
    with torch.no_grad(), asymvlm.patch(copy.deepcopy(windowed), vision=uniform(0.5)) as handle:
        found = handle.model(**inputs).logits
    assert_kept_logits(found, masked_forward(windowed, inputs, selection.keep), selection)


@pytest.mark.parametrize("batch", ["single", "two_images", "left_padded"])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation(windowed, batch, cache):
    inputs = tiny.make_batch("gemma3", batch)
    ids, logits = masked_greedy(windowed, inputs, select(windowed, inputs, 0.5).keep, steps=8)
    with asymvlm.patch(copy.deepcopy(windowed), vision=uniform(0.5)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, **cache, max_new_tokens=8)
    assert torch.equal(found.sequences[:, -8:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_the_reference_sees_the_windows_of_the_plain_model(windowed, batch):
    inputs = tiny.make_batch("gemma3", batch)
    _, logits = masked_greedy(windowed, inputs, torch.ones_like(inputs["input_ids"]).bool(), steps=8)
    expected = windowed.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert_close(torch.stack(expected.logits, 1), logits)
