"""What is done to a cache that holds a pruned prompt is done to what is known of the prompt, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from tiny import make_batch
from transformers import DynamicCache, StaticCache

import asymvlm
from asymvlm.hf.arguments import cache_of
from asymvlm.hf.generation import generate_callee

TEXT = torch.tensor([[5, 9, 11, 8, 13, 7, 10, 12] * 6])  # longer than any shortened prompt here
NEXT = torch.tensor([[6], [9], [11]])


def prefill(model, inputs):
    """A padded batch in a loop by hand, and its cache."""
    with torch.no_grad():
        return cache_of(model(**inputs, use_cache=True))


def step(model, cache, ids, mask=None):
    given = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        return model(input_ids=ids, **{generate_callee(model).cache: cache}, **given).logits[:, -1]


def grown(mask, columns=1):
    return torch.nn.functional.pad(mask, (0, columns), value=1)


@pytest.mark.parametrize("static", [False, True])
def test_a_reset_cache_is_a_new_one(family, plain, model, static):
    """transformers zeroes a growing cache and keeps its columns; the unpatched model then goes on behind zeros."""
    if family == "paligemma":
        pytest.skip("takes no text on a cache that was reset, with or without a patch")
    config, name = model.config.get_text_config(), generate_callee(model).cache
    cache = StaticCache(config, 128) if static else DynamicCache(config=config)
    with asymvlm.patch(model, vision=uniform(0.5)), torch.no_grad():
        model(**make_batch(family, "single"), **{name: cache})
        cache.reset()
        own = copy.deepcopy(cache)
        own.__class__ = StaticCache if static else DynamicCache  # as transformers itself leaves it behind
        columns = int(cache.get_seq_length())
        mask = torch.ones(1, columns + TEXT.shape[1], dtype=torch.int64)
        places = torch.arange(columns, mask.shape[1])[None] + asymvlm.models.adapter_for(model).first_position
        found = model(input_ids=TEXT, attention_mask=mask, position_ids=places, **{name: cache})
        wanted = plain(input_ids=TEXT, attention_mask=mask, position_ids=places, **{name: own})
    assert_close(found.logits, wanted.logits)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0]])
def test_rows_may_be_moved(family, model, order):
    inputs, order = make_batch(family, "left_padded"), torch.tensor(order)
    with asymvlm.patch(model, vision=uniform(0.5)):
        wanted = step(model, prefill(model, inputs), NEXT, grown(inputs["attention_mask"]))
        cache = prefill(model, inputs)
        cache.reorder_cache(order)
        found = step(model, cache, NEXT[order], grown(inputs["attention_mask"])[order])
    assert_close(found, wanted[order])


def test_two_questions_about_one_image(family, model):
    inputs = make_batch(family, "single")
    questions = torch.tensor([[5, 9, 11], [8, 13, 7]])
    name = generate_callee(model).cache

    def ask(cache, rows):
        ids = torch.cat([inputs["input_ids"].expand(len(rows), -1), rows], 1)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **{name: cache}, do_sample=False, max_new_tokens=4
        )[:, ids.shape[1] :]

    with asymvlm.patch(model, vision=uniform(0.5)):
        wanted = [ask(prefill(model, inputs), questions[i : i + 1])[0] for i in range(2)]
        cache = prefill(model, inputs)
        cache.batch_repeat_interleave(2)
        found = ask(cache, questions)
    for answer, alone in zip(found, wanted, strict=True):
        assert torch.equal(answer[: len(alone)], alone)


def test_a_part_of_a_batch_goes_on(family, model):
    inputs, rows = make_batch(family, "left_padded"), torch.tensor([2, 0])
    mask = grown(inputs["attention_mask"])
    with asymvlm.patch(model, vision=uniform(0.5)):
        wanted = step(model, prefill(model, inputs), NEXT, mask)
        cache = prefill(model, inputs)
        cache.batch_select_indices(rows)
        assert_close(step(model, cache, NEXT[rows], mask[rows]), wanted[rows])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_as_the_original(family, model, copied):
    inputs = make_batch(family, "left_padded")
    mask = grown(inputs["attention_mask"])
    with asymvlm.patch(model, vision=uniform(0.5)):
        cache = prefill(model, inputs)
        twin = copied(cache)
        assert isinstance(twin, DynamicCache)
        assert torch.equal(step(model, twin, NEXT, mask), step(model, cache, NEXT, mask))


def test_a_pruned_cache_is_refused_without_a_patch(family, model):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.5)):
        cache = prefill(model, inputs)
        wanted = step(model, copy.deepcopy(cache), NEXT, grown(inputs["attention_mask"]))
    with pytest.raises(RuntimeError, match="patch the model again"):
        step(model, cache, NEXT, grown(inputs["attention_mask"]))
    with asymvlm.patch(model, vision=uniform(0.25)):  # whatever it prunes now, the cache is as it was
        assert torch.equal(step(model, cache, NEXT, grown(inputs["attention_mask"])), wanted)


def test_a_generated_cache_is_remembered_where_the_caller_holds_it(family, model):
    """`generate` that returns ids alone has filled the caller's cache all the same."""
    inputs = make_batch(family, "single")
    name = generate_callee(model).cache
    with asymvlm.patch(model, vision=uniform(0.5)):
        cache = DynamicCache(config=model.config.get_text_config())
        first = model.generate(**inputs, **{name: cache}, do_sample=False, max_new_tokens=3)
        ids = torch.cat([first, torch.tensor([[5, 6]])], 1)
        given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
        found = model.generate(**given, **{name: cache})
        again = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        wanted = model.generate(**given, **{name: cache_of(again)})
    assert torch.equal(found, wanted)


def test_cropping_into_a_pruned_prompt_is_refused_and_crops_behind_it_are_not(family, model):
    inputs = make_batch(family, "single")
    mask = inputs["attention_mask"]
    with asymvlm.patch(model, vision=uniform(0.5)):
        cache = prefill(model, inputs)
        length = cache.get_seq_length()
        wanted = step(model, cache, NEXT[:1], grown(mask))
        if not all(getattr(layer, "is_croppable", True) for layer in cache.layers):
            pytest.skip("this cache cannot be cropped at all")
        try:
            cache.crop(-1)
        except ValueError as error:
            pytest.skip(f"this cache cannot be cropped: {error}")
        assert cache.get_seq_length() == length
        assert_close(step(model, cache, NEXT[:1], grown(mask)), wanted)
        with pytest.raises(ValueError, match="cropped inside a pruned prompt"):
            cache.crop(-4)
