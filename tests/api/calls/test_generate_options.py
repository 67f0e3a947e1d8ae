"""Every way to call ``generate`` must answer as the model's own ``generate`` does with dropped columns closed."""

from __future__ import annotations

import pytest
import torch
import transformers
from checks import GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_generate, masked_greedy, select
from packaging.version import Version
from tiny import FAMILIES, PAD, make_batch, single_rows
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

import asymvlm
from asymvlm.models import adapter_for

GREEDY_IDS = dict(do_sample=False, max_new_tokens=6)
# One image a row: with several, transformers 5.17 repeats images, not rows of images, for beams and return sequences
# (llava, gemma3), so its own answer is wrong. A patched model merges before rows are repeated.
BATCHES = ["single", "one_image_each"]
OPTIONS = {
    "sampling": dict(do_sample=True, top_k=12, num_return_sequences=2, max_new_tokens=6),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2, max_new_tokens=6),
    "beam_sampling": dict(do_sample=True, num_beams=2, max_new_tokens=6),
    "static_cache": dict(cache_implementation="static", **GREEDY_IDS),
    "no_cache": dict(use_cache=False, **GREEDY_IDS),
    "repetition_penalty": dict(repetition_penalty=1.5, **GREEDY_IDS),
    "one_token": dict(do_sample=False, max_new_tokens=1),
    "default_length": dict(do_sample=False),
    "min_new_tokens": dict(do_sample=False, min_new_tokens=4, max_new_tokens=6),
}


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def compare(family, plain, model, batch: str, **options: object) -> torch.Tensor:
    inputs = make_batch(family, batch)
    keep = select(plain, inputs, 0.5).keep
    torch.manual_seed(0)
    expected = masked_generate(plain, inputs, keep, **options)
    torch.manual_seed(0)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, expected)
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_options(family, plain, model, batch, options):
    compare(family, plain, model, batch, **options)


def test_beam_scores(family, plain, model):
    inputs = make_batch(family, "one_image_each")
    options = dict(do_sample=False, num_beams=3, max_new_tokens=5, output_scores=True, return_dict_in_generate=True)
    expected = masked_generate(plain, inputs, select(plain, inputs, 0.5).keep, **options)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.sequences_scores, expected.sequences_scores)


def test_static_cache_after_a_longer_unpruned_run(family, plain, model):
    """Neither run may inherit the other's cache length: the pruned one would pay for it, the other would change."""
    inputs = make_batch(family, "single")
    selection = select(plain, inputs, 0.5)
    options = dict(do_sample=False, cache_implementation="static", return_dict_in_generate=True)
    expected = masked_generate(plain, inputs, selection.keep, max_new_tokens=6, **options)
    unpruned = model.generate(**inputs, max_new_tokens=30, **options)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, max_new_tokens=6, **options)
    again = model.generate(**inputs, max_new_tokens=30, **options)
    assert torch.equal(found.sequences, expected.sequences)
    longest = max(layer.keys.shape[2] for layer in found.past_key_values.layers)
    assert longest <= selection.index.shape[1] + 6
    assert torch.equal(again.sequences, unpruned.sequences)
    lengths = [[layer.keys.shape[2] for layer in out.past_key_values.layers] for out in (unpruned, again)]
    assert lengths[0] == lengths[1]


def test_beams_of_several_images_are_those_of_each_row(family, model):
    options = dict(do_sample=False, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    with asymvlm.patch(model, vision=uniform(0.5)):
        whole = model.generate(**make_batch(family, "left_padded"), **options)[:, -5:]
        singles = [model.generate(**row, **options)[:, -5:] for row in single_rows(family, "left_padded")]
    assert torch.equal(whole, torch.cat(singles))


@pytest.mark.parametrize("call", ["generate", "generate to a dict", "forward"])
def test_a_static_cache_that_was_reset(family, plain, model, call):
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    options = dict(do_sample=False, max_new_tokens=5, past_key_values=cache)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        for seed in (0, 7):
            inputs = make_batch(family, "single", seed)
            selection = select(plain, inputs, 0.5)
            ids, _ = masked_greedy(plain, inputs, selection.keep, steps=5)
            if call == "forward" and seed and adapter_for(model).needs_fresh_cache:
                with pytest.raises(NotImplementedError, match="needs a new cache here"):
                    model(**inputs, past_key_values=cache)
            elif call == "forward":
                logits = model(**inputs, past_key_values=cache).logits
                assert_kept_logits(logits, masked_forward(plain, inputs, selection.keep), selection)
            elif call == "generate":
                assert torch.equal(model.generate(**inputs, **options)[:, -5:], ids)
            else:
                out = model.generate(**inputs, **options, return_dict_in_generate=True)
                assert torch.equal(out.sequences[:, -5:], ids)
            cache.reset()


def test_prompt_lookup(family, plain, model):
    inputs = make_batch(family, "single")
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=12)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, torch.cat([inputs["input_ids"], ids], 1))


def test_chunked_prefill(family, plain, model):
    if not FAMILIES[family].chunked_prefill:
        pytest.skip("prefill in chunks changes the answer of the unpatched model")
    if FAMILIES[family].mrope and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers cuts M-RoPE positions along the wrong axis")
    inputs = make_batch(family, "single")
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, do_sample=False, max_new_tokens=6, prefill_chunk_size=5)
    assert torch.equal(found[:, -6:], ids)


def test_max_length_counts_the_original_prompt(family, plain, model):
    length = make_batch(family, "left_padded")["input_ids"].shape[1] + 5
    assert compare(family, plain, model, "left_padded", do_sample=False, max_length=length).shape[1] == length
    config = GenerationConfig(do_sample=False, max_length=length, pad_token_id=0, eos_token_id=1)
    before = config.to_dict()
    assert compare(family, plain, model, "left_padded", generation_config=config).shape[1] == length
    assert config.to_dict() == before


def test_max_length_of_the_models_own_generation_config(family, plain, model):
    inputs = make_batch(family, "single")
    length = inputs["input_ids"].shape[1] + 4
    model.generation_config.max_length = length
    before = model.generation_config.to_dict()
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=4)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, do_sample=False)
    assert torch.equal(found, torch.cat([inputs["input_ids"], ids], 1))
    assert model.generation_config.to_dict() == before


def test_min_length_counts_the_original_prompt(family, plain, model):
    inputs = make_batch(family, "single")
    length = inputs["input_ids"].shape[1]
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=8)
    stop = ids[0, 1].item()
    options = dict(do_sample=False, max_new_tokens=8, eos_token_id=stop)
    assert compare(family, plain, model, "single", **options).shape[1] <= length + 2
    assert compare(family, plain, model, "single", min_length=length + 4, **options).shape[1] >= length + 4


def test_rows_that_stop_early_are_padded(family, plain, model):
    inputs = make_batch(family, "left_padded")
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=8)
    found = compare(family, plain, model, "left_padded", **GREEDY_IDS, eos_token_id=ids[1, 2].item())
    assert (found[1, -3:] == PAD).all()
    assert (found[:, -1] != PAD).any()


def test_given_positions(family, plain, model):
    inputs = make_batch(family, "single")
    positions = 2 * torch.arange(inputs["input_ids"].shape[1])[None]
    if FAMILIES[family].mrope:
        positions = positions.expand(4, -1, -1)  # text positions and three axes, as transformers makes them
    options = dict(**GREEDY, max_new_tokens=4, position_ids=positions)
    expected = masked_generate(plain, inputs, select(plain, inputs, 0.5).keep, **options)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1))


def test_user_made_cache(family, plain, model):
    inputs = make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=6)
    cache = DynamicCache(config=model.config.get_text_config())
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=6, past_key_values=cache)
    assert found.past_key_values is cache
    assert cache.get_seq_length() == selection.index.shape[1] + 5
    assert torch.equal(found.sequences[:, -6:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


def test_streamer_sees_the_original_prompt_and_each_new_token(family, plain, model):
    inputs = make_batch(family, "single")
    streamer = Recorder()
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **GREEDY_IDS, streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("name", ["inputs", "positional"])
def test_ids_given_as_inputs(family, plain, model, name):
    inputs = make_batch(family, "left_padded")
    expected = masked_generate(plain, inputs, select(plain, inputs, 0.5).keep, **GREEDY_IDS)
    input_ids = inputs.pop("input_ids")
    with asymvlm.patch(model, vision=uniform(0.5)):
        if name == "inputs":
            found = model.generate(inputs=input_ids, **inputs, **GREEDY_IDS)
        else:
            found = model.generate(input_ids, **inputs, **GREEDY_IDS)
    assert torch.equal(found, expected)


def test_padding_is_inferred_as_by_the_model_when_no_mask_is_given(family, plain, model):
    inputs = make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    del inputs["attention_mask"]
    expected = masked_generate(plain, inputs, keep, **GREEDY_IDS)
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert torch.equal(model.generate(**inputs, **GREEDY_IDS), expected)


def test_a_length_that_is_too_short_is_told_in_the_callers_tokens(family, model):
    inputs = make_batch(family, "single")
    length = inputs["input_ids"].shape[1]
    with asymvlm.patch(model, vision=uniform(0.5)), pytest.raises(ValueError, match=f"a prompt of {length} tokens"):
        model.generate(**inputs, max_length=length)
