"""A hand-written decode loop on ``model(**inputs)`` thinks in original lengths and must answer as ``generate`` does."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from loops import decode, positions_of, steps
from masked_reference import masked_forward, masked_greedy, select
from tiny import FAMILIES, make_batch
from torch import nn
from transformers import DynamicCache

import asymvlm
from asymvlm_kernels import ThresholdBudget

LOOPS = [
    ("single", True, False),
    ("single", True, True),
    ("single", False, False),
    ("single", False, True),
    ("two_images", True, False),
    ("two_images", False, False),
    ("left_padded", True, False),
    ("left_padded", True, True),
    ("image_free_row", True, False),
]


@pytest.mark.parametrize("batch, with_mask, with_positions", LOOPS)
@pytest.mark.parametrize("user_cache", [False, True], ids=["new cache", "user cache"])
def test_loop_equals_the_masked_reference(family, plain, model, batch, with_mask, with_positions, user_cache):
    inputs = make_batch(family, batch)
    _, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    positions = positions_of(family, plain, inputs) if with_positions else None
    cache = DynamicCache(config=model.config.get_text_config()) if user_cache else None
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = steps(decode(model, inputs, with_mask, positions, cache))
    assert_close(found, expected)


@pytest.mark.parametrize("batch, with_mask, with_positions", LOOPS)
def test_this_loop_is_right_without_any_patch(family, plain, batch, with_mask, with_positions):
    if FAMILIES[family].mrope and with_mask and not with_positions:
        pytest.skip("transformers derives positions of the mask's length and fails; a patched model makes its own")
    inputs = make_batch(family, batch)
    _, expected = masked_greedy(plain, inputs, torch.ones_like(inputs["input_ids"]).bool(), steps=6)
    positions = positions_of(family, plain, inputs) if with_positions else None
    assert_close(steps(decode(plain, inputs, with_mask, positions)), expected)


def test_a_batch_without_padding_and_without_mask(family, plain, model):
    inputs = make_batch(family, "single")
    other = make_batch(family, "single", seed=5)
    inputs = {name: torch.cat([value, other[name]]) for name, value in inputs.items()}
    _, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert_close(steps(decode(model, inputs, with_mask=False)), expected)


def test_rows_that_keep_different_counts_without_mask(family, plain, model):
    inputs = make_batch(family, "single")
    other = make_batch(family, "single", seed=5)
    inputs = {name: torch.cat([value, other[name]]) for name, value in inputs.items()}
    middle = sum(select(plain, inputs, 1.0).gap) / 2
    budget = ThresholdBudget(middle, 1e9, conservative=0.75, moderate=0.5, aggressive=0.25)
    keep = select(plain, inputs, lambda gap: 0.75 if gap < middle else 0.5).keep
    assert len(set(keep.sum(-1).tolist())) == 2
    _, expected = masked_greedy(plain, inputs, keep, steps=6)
    with asymvlm.patch(model, vision=asymvlm.VisionPruning(budget=budget)):
        assert_close(steps(decode(model, inputs, with_mask=False)), expected)


def test_two_loops_taking_turns(family, plain, model):
    batches = [make_batch(family, "single"), make_batch(family, "two_images", seed=3)]
    expected = [masked_greedy(plain, x, select(plain, x, 0.5).keep, steps=5)[1] for x in batches]
    with asymvlm.patch(model, vision=uniform(0.5)):
        loops = [decode(model, x, positions=positions_of(family, plain, x)) for x in batches]
        turns = [[next(loop) for loop in loops] for _ in range(5)]
    for found, logits in zip(zip(*turns, strict=True), expected, strict=True):
        assert_close(torch.stack(found, 1), logits)


def test_a_loop_goes_on_after_generate_was_called(family, plain, model):
    inputs = make_batch(family, "single")
    _, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5)):
        loop = decode(model, inputs, positions=positions_of(family, plain, inputs))
        first = steps(loop, 3)
        model.generate(**make_batch(family, "two_images"), do_sample=False, max_new_tokens=3)
        assert_close(torch.cat([first, steps(loop, 3)], 1), expected)


def test_a_loop_goes_on_from_the_cache_of_generate(family, plain, model):
    inputs = make_batch(family, "left_padded")
    _, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5)):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        call = {
            "input_ids": first.sequences[:, -1:],
            "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
        }
        found = steps(decode(model, call, cache=first.past_key_values), 3)
    assert_close(found, expected[:, 3:])


def test_several_tokens_at_once(family, plain, model):
    inputs = make_batch(family, "left_padded")
    ids, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        found = model(input_ids=ids[:, :5], attention_mask=mask, past_key_values=cache).logits
    assert_close(found, expected[:, 1:])


def test_right_padded_prompts_go_on_behind_the_padding(family, plain, model):
    if FAMILIES[family].mrope:
        pytest.skip("transformers itself disagrees between a cached step and a whole forward here")
    inputs = make_batch(family, "right_padded")
    length = inputs["input_ids"].shape[1]
    tokens = torch.randint(5, 90, (3, 4), generator=torch.Generator().manual_seed(6))
    whole = {name: nn.functional.pad(value, (0, 4)) for name, value in inputs.items() if value.shape[1] == length}
    whole = {**inputs, **whole, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    for name, value in {"attention_mask": 1, **FAMILIES[family].generated}.items():
        if name in whole:
            whole[name][:, length:] = value
    expected = masked_forward(plain, whole, select(plain, inputs, 0.5).keep)[:, -4:]
    found = []
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        cache = model(**inputs, use_cache=True).past_key_values
        for i in range(4):
            mask = whole["attention_mask"][:, : length + i + 1]
            out = model(input_ids=tokens[:, i : i + 1], attention_mask=mask, past_key_values=cache)
            found.append(out.logits[:, -1])
    assert_close(torch.stack(found, 1), expected)
