"""What goes wrong silently when a cache loses tokens: each of these was seen to, and must not here."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, uniform
from evicted_reference import Masked
from loops import decode, positions_of, steps
from masked_reference import select
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask, flash_attention_mask
from windowed import ATOL, windowed

import asymvlm
import asymvlm.cache.masks as masks
import asymvlm.hf.attention as capture
from asymvlm import EvictionCache, TextEviction
from asymvlm.hf.arguments import cache_in

POLICY = dict(threshold=6, retention=0.5)


LOOPS = [  # family, mask, positions, share of the vision tokens
    ("llava", True, False, None), ("llava", False, False, 0.5), ("gemma3", False, False, None),
    ("gemma3", True, False, 0.5), ("qwen2_5_vl", True, True, None), ("qwen2_5_vl", False, False, None),
    ("qwen2_5_vl", True, False, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("family,with_mask,with_positions,vision", LOOPS)
def test_a_manual_loop_infers_positions_from_the_logical_length(family, with_mask, with_positions, vision):
    model, inputs = windowed(family), tiny.make_batch(family, "single")
    keep = None if vision is None else select(model, inputs, vision).keep
    _, logits = Masked(model, inputs, keep, **POLICY).generate(16)
    patched = copy.deepcopy(model)
    with asymvlm.patch(
        patched, text=TextEviction.paper(**POLICY), **({} if vision is None else {"vision": uniform(vision)})
    ):
        positions = positions_of(family, model, inputs) if with_positions else None
        found = steps(decode(patched, inputs, with_mask, positions), 16)
    assert_close(found, logits, atol=ATOL)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_manual_loop_over_a_padded_batch(family):
    model, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    _, logits = Masked(model, inputs, **POLICY).generate(14)
    patched = copy.deepcopy(model)
    with asymvlm.patch(patched, text=TextEviction.paper(**POLICY)):
        found = steps(decode(patched, inputs, True, positions_of(family, model, inputs)), 14)
    assert_close(found, logits, atol=ATOL)


def test_flash_attention_masks_tell_slots_not_columns():
    """FlashAttention's mask takes the last columns of what it is given: of a mask by column they are the wrong ones."""
    seen = []

    def record(module, args, kwargs):
        cache, mask = cache_in(kwargs), kwargs["attention_mask"]
        if isinstance(cache, EvictionCache) and kwargs["inputs_embeds"].shape[1] == 1:
            seen.append((mask, cache.table.span, cache.table.slot_pos[:, : cache.table.span] >= 0))

    model = copy.deepcopy(windowed("llava"))
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)) as handle:
        hook = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
        model.generate(**tiny.make_batch("llava", "left_padded"), do_sample=False, max_new_tokens=14)
        hook.remove()
    assert handle.last.eviction.evicted[0] > 0
    shortened = [(mask, span, visible) for mask, span, visible in seen[-4:]]
    for mask, span, visible in shortened:
        assert torch.equal(mask.bool(), visible)
        assert torch.equal(flash_attention_mask(3, 1, span, q_offset=span - 1, attention_mask=mask).bool(), visible)
        assert not visible.all(), "there is padding to lose"


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "custom"])
def test_the_scored_layer_keeps_its_mask(implementation):
    """An attention function without a mask function of its own gets no mask, and padding is attended to."""
    given = []

    def custom(module, query, key, value, attention_mask, scaling, **kwargs):
        given.append(attention_mask)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        weights = (query @ key.mT * scaling + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("custom", custom)
    AttentionMaskInterface.register("custom", eager_mask)
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    model.get_decoder().config._attn_implementation = implementation
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        if implementation == "custom":  # changed after the patch: the copy of the configuration must not hide it
            model.get_decoder().config._attn_implementation = "eager"
            model.get_decoder().config._attn_implementation = "custom"
        found = model.generate(**inputs, **GREEDY, max_new_tokens=14)
    assert_close(torch.stack(found.logits, 1), Masked(windowed("llava"), inputs, **POLICY).generate(14)[1], atol=ATOL)
    if implementation == "custom":
        assert len(given) == 3 * 14
        assert all(mask is not None for mask in given)


def test_scores_of_the_captured_layer_are_eager_attention(monkeypatch):
    model, inputs, taken = windowed("gemma3"), tiny.make_batch("gemma3", "left_padded"), []
    score = capture.score
    monkeypatch.setattr(capture, "score", lambda *args: (taken.append(score(*args)), taken[-1])[1])
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction.paper(6, 1.0)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=8)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    plain = eager.generate(**inputs, **GREEDY, max_new_tokens=8, output_attentions=True)
    assert torch.equal(found.sequences, plain.sequences), "nothing was evicted before the last step"
    assert len(taken) == 1
    assert_close(taken[0], plain.attentions[-1][-1][:, :, -1].mean(1), atol=1e-6)
    assert_close(taken[0].sum(-1), torch.ones(3), atol=1e-6)


def test_a_row_that_sees_nothing_scores_zero():
    """A NaN from a row that is all padding would poison the layers behind it, and the order of evictions."""
    step = capture.Places(
        slot_pos=torch.tensor([[-2, -2, -2, -1], [0, 1, 2, -1]], dtype=torch.int32), q_pos=torch.tensor([2, 2])
    )
    for width in (8, 512):  # heads that the kernels take, and wider ones
        scores = capture.score(torch.randn(2, 4, 1, width), torch.randn(2, 2, 4, width), step, width**-0.5, 0.0)
        assert torch.equal(scores[0], torch.zeros(4))
        assert_close(scores[1].sum(), torch.tensor(1.0), atol=1e-6)
        assert scores[1, 3] == 0


@pytest.mark.parametrize("options", [
    dict(prompt_lookup_num_tokens=2), dict(assistant_model=nn.Linear(1, 1)), dict(use_cache=False),
    dict(past_key_values=DynamicCache()), dict(cache_implementation="offloaded"),
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_needs_another_cache_is_refused(options):
    model = copy.deepcopy(windowed("llava"))
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        with pytest.raises((NotImplementedError, ValueError), match="text eviction"):
            model.generate(**tiny.make_batch("llava", "single"), max_new_tokens=4, **options)
        model.generate(**tiny.make_batch("llava", "single"), max_new_tokens=4)


def test_a_crop_is_refused():
    cache = EvictionCache(windowed("llava").config)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_beams_carry_their_slots(family, cache):
    """Beams swap rows after each step: the table of slots has to go along. The best beam is scored again, alone."""
    model, inputs = windowed(family), tiny.make_batch(family, "single")
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction.paper(**POLICY)) as handle:
        found = handle.model.generate(
            **inputs, **cache, do_sample=False, num_beams=3, max_new_tokens=16, return_dict_in_generate=True,
            output_logits=True, output_scores=True,
        )  # fmt: skip
    assert len({*found.beam_indices[0].tolist()}) > 1, "no beam ever moved"
    answer = found.sequences[:, inputs["input_ids"].shape[1] :]
    _, logits = Masked(model, inputs, **POLICY).generate(answer.shape[1], forced=answer)
    along = [step[beam] for step, beam in zip(found.logits, found.beam_indices[0].tolist())]
    assert_close(torch.stack(along), logits[0, : len(along)], atol=ATOL)


def test_sampling_and_several_sequences():
    model, inputs = windowed("llava"), tiny.make_batch("llava", "one_image_each")
    options = dict(
        do_sample=True, num_return_sequences=2, max_new_tokens=14, temperature=2.0, suppress_tokens=tiny.SPECIAL
    )
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction.paper(**POLICY)) as handle:
        torch.manual_seed(0)
        found = handle.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    repeated = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    answer = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert not torch.equal(answer[0], answer[1])
    _, logits = Masked(model, repeated, **POLICY).generate(14, forced=answer)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)


@pytest.mark.parametrize("family", ["llava", "gemma3", "phi3_v"])
def test_all_full_layers_have_one_length_and_masks_fit_it(family):
    """Masks are made once, from the first layer of a kind."""
    model = copy.deepcopy(windowed(family))
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        found = model.generate(**tiny.make_batch(family, "left_padded"), **GREEDY, max_new_tokens=15)
    cache = found.past_key_values
    sizes = {cache.get_mask_sizes(1, index) for index, layer in enumerate(cache.layers) if layer in cache.slot_layers}
    shapes = {layer.keys.shape for layer in cache.slot_layers}
    assert len(sizes) == len(shapes) == 1
    assert sizes.pop()[0] < cache.get_seq_length()


def test_sliding_layers_count_for_themselves():
    """Their mask is as long as what they saw, whatever was evicted elsewhere."""
    model = copy.deepcopy(windowed("gemma3"))
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        found = model.generate(**tiny.make_batch("gemma3", "left_padded"), **GREEDY, max_new_tokens=15)
    cache = found.past_key_values
    sliding = [layer for layer in cache.layers if layer.is_sliding]
    assert {layer.keys.shape[2] for layer in sliding} == {19}
    assert {layer.get_seq_length() for layer in sliding} == {cache.get_seq_length()}


def test_the_phase_is_read_from_the_cache():
    """``cache_position`` is gone from transformers: nothing may ask for it."""
    tables = (asymvlm.cache.table, asymvlm.cache.growing, asymvlm.cache.fixed)
    for module in (capture, masks, asymvlm.cache.eviction_cache, asymvlm.eviction.text, asymvlm.eviction.call, *tables):
        assert "cache_position" not in inspect.getsource(module)


@pytest.mark.parametrize("how", ["decoder", "attention"])
def test_a_failed_step_leaves_no_request_behind(how):
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    expected = Masked(windowed("llava"), inputs, **POLICY).generate(12)[0]
    decoder = model.get_decoder()
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        place = decoder.layers[2] if how == "decoder" else decoder.layers[2].self_attn
        calls = []

        def fail(module, args):
            calls.append(1)
            if len(calls) == 8:  # the step that evicts
                raise InterruptedError

        hook = place.register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            model.generate(**inputs, do_sample=False, max_new_tokens=12)
        hook.remove()
        assert capture.wanted.get() is None
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, -12:], expected)


def test_a_cache_that_starts_over_evicts_again():
    """LongRoPE passes its switch: the whole sequence is fed anew, evicted tokens too, and they are generated ones."""
    model = tiny.build("phi3_v")
    inputs = tiny.make_batch("phi3_v", "single")
    columns = inputs["input_ids"].shape[1]
    model.config.original_max_position_embeddings = columns + 12
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=30)
    stats = found.past_key_values.stats()
    assert handle.last.eviction.cache == stats
    assert stats.logical == columns + 29
    assert stats.held[0] <= 6
    assert stats.physical == columns + stats.held[0]
    whole = [row[row >= 0].tolist() for row in found.past_key_values.table.slot_pos]
    assert {*range(columns)} <= {*whole[0]}, "the prompt stays"
    assert handle.last.eviction.evicted[0] >= 29 - stats.held[0]


@pytest.mark.parametrize("size", [1, 3])
def test_a_prompt_in_chunks_is_a_prompt(size):
    """A chunk of one token is no generated one."""
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "text_only")
    columns = inputs["input_ids"].shape[1]
    assert columns % 3 == 1
    ids, logits = Masked(windowed("llava"), inputs, **POLICY).generate(14)
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=14, prefill_chunk_size=size)
    assert torch.equal(found.sequences[:, -14:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
    assert handle.last.eviction.evicted == [8, 8]


@pytest.mark.parametrize("family", ["llava", "gemma3", "phi3_v", "phi4_multimodal", "idefics3"], indirect=True)
def test_text_alone_is_evicted_and_reported(family, model):
    inputs = tiny.make_batch(family, "text_only")
    with asymvlm.patch(model, text=TextEviction.paper(4, 0.5)) as handle:
        model.generate(**inputs, do_sample=False, max_new_tokens=8)
        assert handle.last.eviction.evicted == [3, 3]
        assert handle.last.vision_tokens == [0, 0]
        assert handle.last.to_dict()["eviction"]["cache"]["held"] == [4, 4]


def test_a_static_cache_named_by_a_generation_config():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    config = copy.deepcopy(model.generation_config)
    config.cache_implementation, config.max_new_tokens, config.do_sample = "static", 14, False
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        found = model.generate(**inputs, generation_config=config, return_dict_in_generate=True)
    assert found.past_key_values.is_static
    assert config.cache_implementation == "static"
    assert torch.equal(found.sequences[:, -14:], Masked(model, inputs, **POLICY).generate(14)[0])


def test_a_checkpoint_of_the_hybrid_days_gets_a_growing_cache():
    model = copy.deepcopy(windowed("gemma3"))
    model.generation_config.cache_implementation = "hybrid"
    inputs = tiny.make_batch("gemma3", "single")
    with asymvlm.patch(model, text=TextEviction.paper(**POLICY)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=9)
        named = model.generate(**inputs, **GREEDY, max_new_tokens=9, cache_implementation="static")
    assert not found.past_key_values.is_static
    assert named.past_key_values.is_static
    assert torch.equal(found.sequences, named.sequences)
    assert model.generation_config.cache_implementation == "hybrid"
