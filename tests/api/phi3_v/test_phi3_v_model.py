"""Phi-3.5-Vision without pruning: caches, batches, LongRoPE and everything `generate` does with negative ids."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from masked_reference import masked_greedy
from phi3_v_tiny import (
    CROP,
    GENERATED,
    LONG,
    ONE,
    SHORT,
    TWO,
    config,
    draw,
    make_batch,
    make_inputs,
    select,
    single_rows,
    tiny_model,
)
from torch import Tensor

import asymvlm
from asymvlm.models.phi3_v import Phi3VForCausalLM

IDS = dict(do_sample=False, max_new_tokens=6)


def uncached(model, inputs: dict[str, Tensor], steps: int, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Greedy ids and logits with every step over the whole sequence."""
    return masked_greedy(model, inputs, torch.ones_like(inputs["input_ids"]).bool(), steps, **kwargs)


@pytest.mark.parametrize("batch", [*GENERATED, "text_only"])
def test_cached_generation_equals_uncached(batch):
    inputs = make_batch(batch)
    ids, logits = uncached(tiny_model(), inputs, steps=8)
    found = tiny_model().generate(**inputs, **GREEDY, max_new_tokens=8)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], ids], 1))
    assert_close(torch.stack(found.logits, 1), logits)
    without = tiny_model().generate(**inputs, **GREEDY, max_new_tokens=8, use_cache=False)
    assert torch.equal(without.sequences, found.sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["left_padded", "right_padded", "image_free_row"])
def test_a_batch_is_its_rows(batch, attention):
    model, inputs = tiny_model(attention=attention), make_batch(batch)
    assert model.model.layers[0].self_attn.config._attn_implementation == attention
    assert model.model.vision_embed_tokens.img_processor.vision_model.config._attn_implementation == attention
    with torch.no_grad():
        logits = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
        for b, row in enumerate(single_rows(batch)):
            assert_close(logits[b, inputs["attention_mask"][b].bool()], model(**row).logits[0])


def test_every_image_and_its_place_matter():
    inputs = make_batch("two_images")
    with torch.no_grad():
        expected = tiny_model()(**inputs).logits[0, -1]
        for image in (0, 1):
            other = inputs["pixel_values"].clone()
            other[image, 0, 0, 0, 0] += 5
            assert (tiny_model()(**{**inputs, "pixel_values": other}).logits[0, -1] - expected).abs().max() > 1e-4


def test_static_cache_equals_dynamic():
    inputs = make_batch("left_padded")
    expected = tiny_model().generate(**inputs, **IDS)
    assert torch.equal(copy.deepcopy(tiny_model()).generate(**inputs, **IDS, cache_implementation="static"), expected)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)], ids=str)
def test_beams_take_all_images_of_their_row(options):
    inputs = make_batch("left_padded")
    found = tiny_model().generate(**inputs, **IDS, **options)
    each = options.get("num_return_sequences", 1)
    for b, row in enumerate(single_rows("left_padded")):
        alone = tiny_model().generate(**row, **IDS, **options)
        assert torch.equal(found[b * each : (b + 1) * each, -6:], alone[:, -6:])


def test_penalties_read_placeholders_as_token_0():
    inputs = make_batch("single")
    scored = inputs["input_ids"].clamp(min=0)
    with torch.no_grad():
        logits = tiny_model()(**inputs).logits[0, -1]
    penalized = logits.clone()
    penalized[scored[0]] = torch.where(logits[scored[0]] < 0, logits[scored[0]] * 3, logits[scored[0]] / 3)
    options = dict(do_sample=False, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    found = tiny_model().generate(**inputs, repetition_penalty=3.0, **options)
    assert_close(found.scores[0][0], penalized)


def test_inputs_are_left_as_they_are():
    inputs = make_batch("left_padded")
    given = {name: value.clone() for name, value in inputs.items()}
    tiny_model().generate(**inputs, max_new_tokens=2)
    assert all(torch.equal(inputs[name], given[name]) for name in given)


def test_hidden_states_attentions_and_tuples():
    """Recording changes nothing, not even in the calls after it."""
    model, inputs = copy.deepcopy(tiny_model(attention="eager")), make_batch("single")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny_model(attention="eager")(**inputs).logits)
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert (len(out.hidden_states), len(out.attentions)) == (4, 3)
        assert_close(out.logits, model.lm_head(out.hidden_states[-1]))
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
        assert_close(model(**inputs, logits_to_keep=2).logits, out.logits[:, -2:])


def test_training_reaches_every_part_and_checkpointing_changes_nothing():
    inputs = make_batch("single")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny_model()).train()
        if checkpointing:
            with warnings.catch_warnings(action="ignore"):  # the name that both tested versions have
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    unused = ("encoder.layers.2.", "post_layernorm")  # CLIP's last layer is in the checkpoint, not in the model's path
    for name, gradient in gradients[0].items():
        assert (gradient is None or not gradient.any()) == any(part in name for part in unused), name
        if gradient is not None:
            assert_close(gradients[1][name], gradient)


ERRORS = [
    (
        lambda x: {"pixel_values": x["pixel_values"][:1], "image_sizes": x["image_sizes"][:1]},
        "image placeholders, one a token",
    ),
    (lambda x: {"input_ids": x["input_ids"].clamp(min=0)}, r"must hold \d+ image placeholders, one a token, got 0"),
    (lambda x: {"image_sizes": None}, r"image_sizes must be \(2, 2\), one row an image, got None"),
    (lambda x: {"image_sizes": x["image_sizes"][:1]}, r"image_sizes must be \(2, 2\).* got \(1, 2\)"),
    (lambda x: {"image_sizes": x["image_sizes"] + 1}, f"multiples of {CROP} for at most 4 crops, got"),
    (lambda x: {"image_sizes": torch.full((2, 2), 3 * CROP)}, f"for at most 4 crops, got {3 * CROP}x{3 * CROP}"),
    (lambda x: {"image_sizes": torch.zeros(2, 2, dtype=torch.long)}, "got 0x0"),
    (lambda x: {"pixel_values": x["pixel_values"][..., :-1]}, rf"\(images, views, 3, {CROP}, {CROP}\), got"),
    (lambda x: {"input_ids": None, "inputs_embeds": torch.zeros(1, 9, 32)}, "pixel_values need input_ids"),
    (lambda x: {"input_ids": None}, "either input_ids or inputs_embeds"),
    (lambda x: {"pixel_values": None}, "hold image placeholders, wanted pixel_values"),
]


@pytest.mark.parametrize("change,message", ERRORS)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = make_batch("two_images")
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**inputs, **change(inputs)})


# ---- LongRoPE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling", [{"type": "su"}, {"type": "longrope"}, {"rope_type": "longrope"}, {"rope_type": "su"}]
)
def test_both_spellings_of_the_scaling(spelling):
    factors = dict(short_factor=SHORT, long_factor=LONG)
    settings = config(rope_scaling={**spelling, **factors})
    assert settings.rope_parameters == config().rope_parameters
    assert settings.rope_parameters == dict(
        rope_type="longrope",
        rope_theta=10000.0,
        original_max_position_embeddings=256,
        partial_rotary_factor=1.0,
        **factors,
    )
    assert config(rope_scaling=None).longrope_switch == math.inf


@pytest.mark.parametrize("length", [250, 256, 257, 300])
def test_factors_by_length(length):
    """Short up to the trained length, long beyond, both scaled by sqrt(1 + ln(growth) / ln(trained length))."""
    settings = config()
    factors = torch.tensor(LONG if length > 256 else SHORT, dtype=torch.double)
    angles = torch.arange(length).double()[:, None] / (factors * 10000.0 ** (torch.arange(0, 8, 2).double() / 8))
    scale = math.sqrt(1 + math.log(settings.max_position_embeddings / 256) / math.log(256))
    rotary = copy.deepcopy(tiny_model().model.rotary_emb)
    for _ in range(2):
        rotary(torch.zeros(1), torch.tensor([[999]]))  # an earlier, longer call must not stick
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        assert_close(cos[0], (angles.cos().repeat(1, 2) * scale).float(), atol=3e-5)
        assert_close(sin[0], (angles.sin().repeat(1, 2) * scale).float(), atol=3e-5)


ROWS = {"single": (ONE,), "batch": (TWO, ONE)}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generation_that_passes_the_switch_starts_over_with_its_images(rows, cache):
    inputs = make_inputs(rows)
    length = inputs["input_ids"].shape[1]
    model = copy.deepcopy(tiny_model(switch=length + 3))
    ids, logits = uncached(model, inputs, steps=8)
    found = model.generate(**inputs, **GREEDY, max_new_tokens=8, **cache)
    assert torch.equal(found.sequences[:, length:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    never = copy.deepcopy(tiny_model(switch=1000))
    never.config.max_position_embeddings = model.config.max_position_embeddings
    assert (torch.stack(never.generate(**inputs, **GREEDY, max_new_tokens=8).logits, 1) - logits)[
        :, 5:
    ].abs().max() > 1e-3


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("after", [-5, 0, 3], ids=["prompt is past it", "first token passes it", "answer passes it"])
def test_a_pruned_prompt_switches_where_the_whole_one_does(rows, after):
    """Kept positions: the factors depend on the original length, though the pruned sequence is far shorter."""
    inputs = make_inputs(rows)
    length = inputs["input_ids"].shape[1]
    plain = tiny_model(switch=length + after)
    selection = select(plain, inputs, 0.25)
    assert selection.index.shape[1] + 8 < length + after, "the pruned sequence itself stays below the switch"
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=8)
    model = copy.deepcopy(plain)
    towers: list[int] = []
    model.model.vision_embed_tokens.register_forward_pre_hook(lambda *_: towers.append(1))
    with asymvlm.patch(model, vision=uniform(0.25)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], ids], 1))
    assert_close(torch.stack(found.logits, 1), logits)
    assert len(towers) == 1, "starting over needs no images"


def test_compact_positions_stay_below_the_switch():
    inputs = make_inputs((ONE,))
    plain = tiny_model(switch=inputs["input_ids"].shape[1] - 3)
    keep = select(plain, inputs, 0.25).keep
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    ids, logits = masked_greedy(plain, inputs, keep, steps=4, position_ids=positions)
    model = copy.deepcopy(plain)
    with asymvlm.patch(model, vision=uniform(0.25, positions="compact")):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(found.sequences[:, -4:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


def test_a_window_beyond_all_positions_is_none():
    """The hub's 262144: it closes nothing, and would turn every cache layer into a sliding one."""
    assert config(sliding_window=262144).sliding_window is None
    assert config(sliding_window=64).sliding_window == 64
    model = Phi3VForCausalLM(config(sliding_window=262144)).eval()
    draw(model)
    cache = model(**make_batch("single"), use_cache=True).past_key_values
    assert cache.is_sliding == [False] * 3
