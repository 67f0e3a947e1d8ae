"""Methods of text eviction: whose attention scores, who shares a choice, and what of the prompt may go.

The oracle removes nothing: every step runs over the whole sequence, and each layer and head has its own closed columns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import tiny
import torch
from checks import GREEDY, assert_close
from evicted_by_line import MaskedByLine, held_by_line
from evicted_reference import NEVER, Masked
from windowed import windowed

import asymvlm
from asymvlm import EvictionCache, TextEviction, VisionPruning
from asymvlm.methods import CachedMethod, LastRow, OldestFirst, RandomEviction
from asymvlm_kernels import UniformBudget

POLICY = dict(threshold=6, retention=0.5)
STEPS = 14


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "phi3_v"])
def test_other_tokens_in_each_layer_and_head_equal_masking(family, scope, implementation):
    plain, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    oracle = MaskedByLine(plain, inputs, scope=scope, **POLICY)
    ids, logits = oracle.generate(STEPS)
    model = copy.deepcopy(plain)
    model.set_attn_implementation(implementation)
    with asymvlm.patch(model, text=TextEviction(**POLICY, method=LastRow(scope=scope))) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    held = held_by_line(found.past_key_values)
    assert len(held) == sum(kind == "full_attention" for kind in oracle.kinds)
    lines = {str(line) for table in held for line in table}
    assert len(lines) > len(inputs["input_ids"]), "layers or heads must differ"
    evicted = STEPS - 1 - max(sum(column >= oracle.prompt for column in line) for line in held[0])
    assert handle.last.eviction.evicted == [evicted] * len(inputs["input_ids"])


@pytest.mark.parametrize("scope", ["decoder", "layer", "head"])
def test_vision_is_pruned_beside_it(scope):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    with asymvlm.patch(
        copy.deepcopy(plain),
        vision=VisionPruning(budget=UniformBudget(0.5)),
        text=TextEviction(**POLICY, method=LastRow(scope=scope)),
    ) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    keep = torch.zeros_like(inputs["input_ids"]).bool()
    for row, columns in enumerate(handle.last.index.tolist()):
        keep[row, [column for column in columns if column >= 0]] = True
    if scope == "decoder":
        oracle = Masked(plain, inputs, keep, **POLICY)
    else:
        oracle = MaskedByLine(plain, inputs, keep, scope=scope, **POLICY)
    ids, logits = oracle.generate(STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
def test_the_prompt_may_go_too(sinks, static):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    model = copy.deepcopy(plain)
    oracle = MaskedByLine(plain, inputs, scope="decoder", sinks=sinks, **POLICY)
    ids, logits = oracle.generate(STEPS)
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with asymvlm.patch(model, text=TextEviction(**POLICY, method=LastRow(sinks=sinks))):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS, **options)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    lost = [sum(death[column] != NEVER for column in range(oracle.prompt)) for death in oracle.deaths[0][:, 0]]
    assert all(lost), "tokens of each prompt must have gone"


@pytest.mark.parametrize("scope", ["decoder", "head"])
def test_the_oldest_go_first(scope):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    with asymvlm.patch(
        copy.deepcopy(plain), text=TextEviction(**POLICY, method=OldestFirst(scope=scope, sinks=4))
    ) as handle:
        cache = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS).past_key_values
    prompt, seen = inputs["input_ids"].shape[1], cache.get_seq_length()
    gone = handle.last.eviction.evicted[0]
    for number, line in enumerate(held_by_line(cache)[0]):
        row = number // cache.table.heads
        real = inputs["attention_mask"][row].nonzero()[:, 0].tolist() + list(range(prompt, seen))
        assert line == real[:4] + real[4 + gone :]


def test_random_eviction_is_the_same_in_any_batch():
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    rows, found = tiny.single_rows("llava", "left_padded"), {}
    for seed in (0, 1):
        policy = TextEviction(**POLICY, method=RandomEviction(seed=seed))
        with asymvlm.patch(copy.deepcopy(plain), text=policy) as handle:
            cache = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS).past_key_values
            found[seed] = [
                [column - inputs["input_ids"].shape[1] for column in line if column >= inputs["input_ids"].shape[1]]
                for line in held_by_line(cache)[0]
            ]
            for number, row in enumerate(rows):
                cache = handle.model.generate(**row, **GREEDY, max_new_tokens=STEPS).past_key_values
                prompt = row["input_ids"].shape[1]
                alone = [column - prompt for column in held_by_line(cache)[0][0] if column >= prompt]
                assert alone == found[seed][number]
    assert found[0] != found[1]
    assert len({str(row) for row in found[0]}) > 1


def test_beams_carry_their_heads_along():
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    options = dict(num_beams=3, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    untouched = TextEviction(threshold=40, retention=1.0, method=LastRow(scope="head"))
    with asymvlm.patch(copy.deepcopy(plain), text=untouched) as handle:
        found = handle.model.generate(**inputs, **options)
    assert torch.equal(found.sequences, plain.generate(**inputs, **options).sequences)
    with asymvlm.patch(copy.deepcopy(plain), text=TextEviction(3, 0.7, method=LastRow(scope="head"))) as handle:
        cache = handle.model.generate(**inputs, **options).past_key_values
    assert [len(table.slot_pos) for table in cache.tables] == [3 * 3 * 2] * 3
    assert all(len(line) == len(lines[0]) for lines in held_by_line(cache) for line in lines[:6])


def test_a_later_turn_goes_on_with_other_tokens_in_each_head():
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    oracle = MaskedByLine(plain, inputs, scope="head", **POLICY)
    first, _ = oracle.generate(STEPS)
    question = torch.full((3, 5), 7)
    oracle.append(question)
    oracle.generated = [column for column in oracle.generated if column < oracle.columns - 5]
    logits = oracle.forward()
    with asymvlm.patch(copy.deepcopy(plain), text=TextEviction(**POLICY, method=LastRow(scope="head"))) as handle:
        before = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        assert torch.equal(before.sequences[:, -STEPS:], first)
        ids = torch.cat([before.sequences, question], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + 5), value=1)
        name = "past_key_values"
        after = handle.model.generate(
            input_ids=ids, attention_mask=mask, **{name: before.past_key_values}, **GREEDY, max_new_tokens=1
        )
    assert_close(after.logits[0], logits)


@dataclass(frozen=True)
class Odd(CachedMethod):
    """A third party's: what the newest token attends to least, by layer."""

    name = "odd"
    scope: str = "layer"

    def scores(self, tokens):
        assert tokens.layer is not None
        assert tokens.attention.shape == tokens.columns.shape
        return -tokens.attention


def test_a_method_of_somebody_elses():
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    oracle = MaskedByLine(plain, inputs, scope="layer", score=lambda scores, last: -scores, **POLICY)
    ids, logits = oracle.generate(STEPS)
    with asymvlm.patch(copy.deepcopy(plain), text=TextEviction(**POLICY, method=Odd())) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


@dataclass(frozen=True)
class Nowhere(CachedMethod):
    scope: str = "token"

    def scores(self, tokens):
        return tokens.attention


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="the scope of a method must be one of decoder, layer, head, got 'token'"):
        TextEviction(6, 0.5, method=Nowhere())
    with pytest.raises(ValueError, match="sinks must be a whole number of at least 0, got -1"):
        TextEviction(6, 0.5, method=LastRow(sinks=-1))
    with pytest.raises(ValueError, match=r"no method is called 'stride'; known: .*attention.*oldest"):
        TextEviction(6, 0.5, method="stride")
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "single")
    by_head = TextEviction(**POLICY, method=LastRow(scope="head"))
    with asymvlm.patch(copy.deepcopy(plain), text=by_head) as handle:
        with pytest.raises(NotImplementedError, match="a static cache holds the same tokens in every layer"):
            handle.model.generate(**inputs, max_new_tokens=8, cache_implementation="static")
        cache = EvictionCache(plain.config)
        told = r"needs EvictionCache\(config, scope='head'\), got one of scope 'decoder'"
        with pytest.raises(ValueError, match=told):
            handle.model.generate(**inputs, max_new_tokens=8, past_key_values=cache)
        with torch.no_grad(), pytest.raises(ValueError, match=told):  # in a loop of the caller's own too
            handle.model(**inputs, past_key_values=cache)


def test_random_eviction_tells_images_apart():
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "single")
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) * 1.5}
    held = []
    for call in (inputs, inputs, other):
        with asymvlm.patch(copy.deepcopy(plain), text=TextEviction(**POLICY, method="random eviction")) as handle:
            cache = handle.model.generate(**call, **GREEDY, max_new_tokens=STEPS).past_key_values
        held.append(held_by_line(cache)[0])
    assert held[0] == held[1] != held[2]
