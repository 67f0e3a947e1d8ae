"""Calls without anything to prune must pass through, bit for bit; an image-free row keeps all its tokens."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, uniform
from masked_reference import masked_forward, select
from tiny import make_batch
from transformers import StaticCache

import asymvlm


def assert_same_calls(plain, model, inputs, **call: object) -> None:
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    found = model.generate(**inputs, **GREEDY, max_new_tokens=5, **call)
    expected = plain.generate(**inputs, **GREEDY, max_new_tokens=5, **call)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_text_only(family, plain, model):
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert_same_calls(plain, model, make_batch(family, "text_only"))


def test_text_only_after_a_pruned_call(family, plain, model):
    text = make_batch(family, "text_only")
    with asymvlm.patch(model, vision=uniform(0.5)):
        model.generate(**make_batch(family, "two_images"), max_new_tokens=2)
        plain.generate(**make_batch(family, "two_images"), max_new_tokens=2)
        assert_same_calls(plain, model, text)


def test_text_only_on_a_cache_that_was_reset(family, plain, model):
    inputs = make_batch(family, "single")
    ids = make_batch(family, "text_only")["input_ids"][1:]
    used, fresh = (StaticCache(config=plain.config.get_text_config(), max_cache_len=64) for _ in range(2))
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        model(**inputs, past_key_values=used)
        used.reset()
        assert torch.equal(model(ids, past_key_values=used).logits, plain(ids, past_key_values=fresh).logits)


def test_text_only_embeddings(family, plain, model):
    text = make_batch(family, "text_only")
    embeds = plain.get_input_embeddings()(text["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_disabled(family, plain, model, batch):
    inputs = make_batch(family, batch)
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        handle.enabled = False
        assert_same_calls(plain, model, inputs)
        assert handle.last is None
        handle.enabled = True
        model.generate(**inputs, max_new_tokens=1)
        assert handle.last is not None


def test_an_image_free_row_keeps_its_tokens(family, plain, model):
    inputs = make_batch(family, "image_free_row")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model(**inputs).logits
    text = inputs["attention_mask"][1].nonzero()[:, 0]
    assert handle.last.index[1][-len(text) :].tolist() == text.tolist()
    expected = masked_forward(plain, inputs, select(plain, inputs, 0.5).keep)[1, text]
    torch.testing.assert_close(found[1, -len(text) :], expected, rtol=0, atol=1e-5)
