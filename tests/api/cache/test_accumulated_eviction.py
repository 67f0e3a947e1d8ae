"""Text eviction by accumulated attention, the default: what is evicted equals masking it, whatever is around it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close
from evicted_by_line import MaskedByLine, held_by_line
from evicted_reference import NEVER
from windowed import windowed

import asymvlm
from asymvlm import TextEviction
from asymvlm.methods import H2O

POLICY = dict(threshold=8, retention=0.5)
RECENT = 2  # two thirds of floor(0.5 * 8), rounded down: what the default spares
STEPS = 15  # two evictions


@pytest.mark.parametrize(
    "family,scope,options",
    [
        ("gemma3", "head", {}),
        ("qwen2_5_vl", "layer", {"attention": "eager"}),
        ("phi3_v", "layer", {}),
        ("llava", "layer", {"cut": True}),
        ("llava", "decoder", {}),
        ("llava", "decoder", {"cache_implementation": "static", "disable_compile": True}),
    ],
    ids=["gemma3-head", "qwen-eager", "phi3-layer", "llava-chunks", "llava-decoder", "llava-static"],
)
def test_accumulated_scores_equal_masking(family, scope, options):
    plain, options = windowed(family), dict(options)
    inputs = tiny.make_batch(family, "text_only" if "cut" in options else "left_padded")
    oracle = MaskedByLine(plain, inputs, scope=scope, adds_up=True, recent=RECENT, **POLICY)
    ids, logits = oracle.generate(STEPS)
    model = copy.deepcopy(plain)
    model.set_attn_implementation(options.pop("attention", "sdpa"))
    if options.pop("cut", False):  # the last part of the prompt is a token of its own, and no generated one
        options["prefill_chunk_size"] = inputs["input_ids"].shape[1] - 1
    with asymvlm.patch(model, text=TextEviction(**POLICY, scope=scope)) as handle:
        found = model.generate(**inputs, **GREEDY, **options, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert handle.last.eviction.evicted == [10] * len(ids)
    latest = MaskedByLine(plain, inputs, scope=scope, recent=RECENT, **POLICY)
    latest.generate(STEPS, forced=ids)
    assert any((oracle.deaths[layer] != latest.deaths[layer]).any() for layer in oracle.deaths), "sums must matter"


def test_a_row_is_the_same_in_any_batch():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    with asymvlm.patch(model, text=TextEviction(**POLICY)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        for number, row in enumerate(tiny.single_rows("llava", "left_padded")):
            alone = model.generate(**row, **GREEDY, max_new_tokens=STEPS)
            pads = inputs["input_ids"].shape[1] - row["input_ids"].shape[1]
            held = [
                [[column + pads for column in line] for line in lines] for lines in held_by_line(alone.past_key_values)
            ]
            assert held == [[lines[number]] for lines in held_by_line(found.past_key_values)]
            assert_close(torch.stack(alone.logits)[:, 0], torch.stack(found.logits)[:, number])


def test_a_later_turn_counts_its_generated_tokens_alone():
    """The question's tokens add nothing; sums of the first answer go on in the second."""
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    oracle = MaskedByLine(plain, inputs, scope="layer", adds_up=True, recent=RECENT, **POLICY)
    first, _ = oracle.generate(6)
    question = torch.full((3, 4), 7)
    oracle.append(question)
    second, logits = oracle.generate(9)
    with asymvlm.patch(copy.deepcopy(plain), text=TextEviction(**POLICY)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=6)
        ids = torch.cat([inputs["input_ids"], first, question], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 10), value=1)
        cache = {"past_key_values": found.past_key_values}
        found = handle.model.generate(input_ids=ids, attention_mask=mask, **cache, **GREEDY, max_new_tokens=9)
        assert handle.last.eviction.evicted == [5] * 3
    assert torch.equal(found.sequences[:, -9:], second)
    assert_close(torch.stack(found.logits, 1), logits)
    assert all((death != NEVER).any() for death in oracle.deaths.values())


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_threshold_that_is_not_reached_leaves_the_model_alone(family):
    plain, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    expected = plain.generate(**inputs, **GREEDY, max_new_tokens=4)
    model = copy.deepcopy(plain)
    with asymvlm.patch(model, text=TextEviction(512, 0.5)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    again = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    for logits in (found.logits, again.logits):
        assert torch.equal(torch.stack(logits), torch.stack(expected.logits))
    assert "generate" not in vars(model)
    assert not any("_asymvlm_config" in vars(module) for module in model.modules())


def test_steps_while_the_patch_is_off_add_nothing():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")
    with asymvlm.patch(model, text=TextEviction(**POLICY)) as handle, torch.no_grad():
        cache = model(**inputs).past_key_values
        sums = []
        for on in (True, False, True):
            handle.enabled = on
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
            sums.append(cache.tables[0].slot_state("attention").sum().item())
    assert sums == pytest.approx([1, 1, 2], abs=1e-5)  # each step hands out attention of 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_adds_up_in_single(dtype):
    model, inputs = copy.deepcopy(windowed("llava")).to(dtype), tiny.make_batch("llava", "left_padded")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with asymvlm.patch(model, text=TextEviction(4, 0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=7)
    assert torch.stack(found.logits).isfinite().all()
    assert handle.last.eviction.evicted == [3] * 3
    assert found.past_key_values.tables[0].slot_state("attention").dtype == torch.float32


def test_what_needs_one_choice_for_all_layers_names_it():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")
    with asymvlm.patch(model, text=TextEviction(**POLICY)) as handle:
        with pytest.raises(
            NotImplementedError, match=r"static cache .* got scope 'layer': TextEviction\(scope='decoder'"
        ):
            handle.model.generate(**inputs, max_new_tokens=8, cache_implementation="static")
        cache = asymvlm.EvictionCache(model.config)
        with pytest.raises(ValueError, match=r"'h2o' needs EvictionCache\(config, scope='layer'\), got one of scope"):
            handle.model.generate(**inputs, max_new_tokens=8, past_key_values=cache)


def test_it_is_the_rule_of_h2o_on_generated_tokens():
    """What goes one by one past a threshold is what a limit of as many generated tokens drops."""
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    rule = H2O(2 / 3, scope="layer")
    held = []
    for settings in (
        {"text": TextEviction(6, 1.0)},
        {"cache": asymvlm.CacheLimit(rule, tokens=6, protect_prompt=True)},
    ):
        with asymvlm.patch(model, **settings):
            found = model.generate(**inputs, **GREEDY, max_new_tokens=11)
        held.append(held_by_line(found.past_key_values))
    assert held[0] == held[1]
