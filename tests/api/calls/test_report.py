"""The report must say what happened: counts, index, scores, work and bytes, checked against hand counts."""

from __future__ import annotations

import json

import pytest
import torch
from checks import one_tier_each, uniform
from masked_reference import select
from tiny import TEXT, make_batch, text_layers, vision_columns
from transformers import DynamicCache, StaticCache

import asymvlm
from asymvlm import VisionPruning
from asymvlm.models.flops import cache_bytes, unpruned_cache_bytes
from asymvlm_kernels import LinearBudget

BYTES_PER_TOKEN = 2 * TEXT["num_key_value_heads"] * TEXT["head_dim"] * 4  # K and V, fp32, one layer


def flops(tokens: int, layers: int) -> int:
    n, d, m = tokens, TEXT["hidden_size"], TEXT["intermediate_size"]
    return layers * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m)


@pytest.mark.parametrize("batch", ["single", "left_padded", "right_padded"])
@pytest.mark.parametrize("generating", [False, True], ids=["forward", "generate"])
def test_counts_index_and_work(family, plain, model, batch, generating):
    inputs = make_batch(family, batch)
    selection = select(plain, inputs, 0.5)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        assert handle.last is None
        if generating:
            model.generate(**inputs, max_new_tokens=3)
        else:
            model(**inputs, use_cache=True)
    report, layers = handle.last, len(text_layers(plain))
    real = inputs["attention_mask"].sum(-1).tolist()
    after = selection.keep.sum(-1).tolist()
    assert report.tokens_before == real
    assert report.tokens_after == after
    assert report.vision_tokens == [sum(map(len, images)) for images in vision_columns(plain, inputs["input_ids"])]
    assert report.kept == selection.kept
    assert report.keep_ratio == [0.5] * len(real)
    assert report.tier == [None] * len(real)
    assert report.index.dtype == torch.int64
    assert torch.equal(report.index, selection.index)
    assert report.gap == pytest.approx(selection.gap, abs=1e-6)
    assert report.scores.dtype == torch.float32
    torch.testing.assert_close(report.scores.double(), selection.scores, rtol=0, atol=1e-6)
    assert report.flops_before == [flops(n, layers) for n in real]
    assert report.flops_after == [flops(n, layers) for n in after]
    rows, length, shorter = *inputs["input_ids"].shape, selection.index.shape[1]
    assert report.kv_bytes == rows * shorter * layers * BYTES_PER_TOKEN
    assert report.kv_bytes_before == rows * length * layers * BYTES_PER_TOKEN
    assert report.vision_flops > 0


def test_no_cache_has_no_bytes(family, model):
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        model(**make_batch(family, "single"), use_cache=False)
    assert handle.last.kv_bytes is None
    assert handle.last.kv_bytes_before is None


def test_vision_work_does_not_depend_on_the_ratio(family, model):
    found = set()
    for ratio in (0.25, 0.75, 1.0):
        with torch.no_grad(), asymvlm.patch(model, vision=uniform(ratio)) as handle:
            model(**make_batch(family, "single"))
        found.add(handle.last.vision_flops)
    assert len(found) == 1


def test_tiers_follow_the_gaps(family, plain, model):
    inputs = make_batch(family, "left_padded")
    gaps = select(plain, inputs, 1.0).gap
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(budget=one_tier_each(gaps))) as handle:
        model(**inputs)
    named = {"conservative": 0.75, "moderate": 0.625, "aggressive": 0.5}
    order = sorted(range(3), key=lambda b: gaps[b])
    assert [handle.last.tier[b] for b in order] == list(named)
    assert handle.last.keep_ratio == [named[tier] for tier in handle.last.tier]


def test_a_linear_budget_follows_the_gap(family, plain, model):
    inputs = make_batch(family, "left_padded")
    mean = sum(select(plain, inputs, 1.0).gap) / 3

    def ratio(gap: float) -> float:
        return min(max(0.6 - 3.0 * (gap - mean), 0.3), 0.95)

    selection = select(plain, inputs, ratio)
    budget = LinearBudget(target=0.6, slope=-3.0, mean_gap=mean)
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(budget=budget)) as handle:
        model(**inputs)
    assert handle.last.kept == selection.kept
    assert handle.last.keep_ratio == pytest.approx([ratio(gap) for gap in selection.gap], abs=1e-5)
    assert len(set(handle.last.keep_ratio)) == 3


def test_rows_that_keep_everything_are_noted(family, plain, model):
    inputs = make_batch(family, "image_free_row")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        model(**inputs)
    assert handle.last.vision_tokens == [16, 0, 32]
    assert handle.last.kept == [8, 0, 16]
    assert handle.last.tokens_after[1] == handle.last.tokens_before[1] == 6
    assert [note for note in handle.last.notes if "relevant" not in note] == ["row 1: no vision token to prune"]


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("batch", ["image_free_row", "left_padded"])
def test_to_dict_survives_json(family, model, batch, ratio):
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(ratio)) as handle:
        model(**make_batch(family, batch), use_cache=True)
    told = json.loads(json.dumps(handle.last.to_dict(), allow_nan=False))
    for name in (
        "tokens_before",
        "tokens_after",
        "vision_tokens",
        "kept",
        "keep_ratio",
        "tier",
        "flops_after",
        "notes",
    ):
        assert told[name] == getattr(handle.last, name)
    assert told["kv_bytes"] == handle.last.kv_bytes


def test_a_bypassed_call_reports_that_all_was_kept(family, model):
    inputs = make_batch(family, "left_padded")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(1.0)) as handle:
        model(**inputs)
    report = handle.last
    assert report.tokens_after == report.tokens_before == inputs["attention_mask"].sum(-1).tolist()
    assert report.kept == report.vision_tokens == [16, 16, 32]
    assert report.keep_ratio == [1.0] * 3
    assert report.flops_after == report.flops_before


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_padding_is_not_counted_when_generate_infers_the_mask(family, model, ratio):
    inputs = make_batch(family, "left_padded")
    real = inputs.pop("attention_mask").sum(-1).tolist()
    with asymvlm.patch(model, vision=uniform(ratio)) as handle:
        model.generate(**inputs, max_new_tokens=2)
    assert handle.last.tokens_before == real


def test_bytes_count_every_beam(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        model.generate(**inputs, max_new_tokens=3)
        one = handle.last.kv_bytes
        model.generate(**inputs, max_new_tokens=3, num_beams=3)
    assert handle.last.kv_bytes == 3 * one


def test_bytes_of_a_quantized_cache_are_unknown_not_zero():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 2 * 24 * 4
    assert unpruned_cache_bytes(cache, 3, 6, None) == 4 * 24 * 4
    cache.layers[0]._quantized_keys = cache.layers[0]._quantized_values = None
    assert cache_bytes(cache) is None
    assert unpruned_cache_bytes(cache, 3, 6, None) is None


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
def test_bytes_leave_slots_out_that_are_not_filled(family, model):
    inputs = make_batch(family, "single")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        model(**inputs, use_cache=True)
        growing = handle.last.kv_bytes, handle.last.kv_bytes_before
        model(**inputs, past_key_values=StaticCache(model.config, max_cache_len=200))
        assert (handle.last.kv_bytes, handle.last.kv_bytes_before) == growing
