"""Prompts a processor really makes and that break assumptions: the answer must still be the masked reference's."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_generate, masked_greedy, select
from tiny import (
    ADJACENT,
    AUDIO,
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    FAMILIES,
    IMAGE,
    make_batch,
    make_inputs,
    make_video,
)
from torch import Tensor

import asymvlm


def check_both_calls(plain, model, inputs: dict[str, Tensor], ratio: float = 0.5) -> None:
    selection = select(plain, inputs, ratio)
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=5)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(ratio)) as handle:
        forward = model(**inputs).logits
        assert torch.equal(handle.last.index, selection.index)
        found = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    assert_kept_logits(forward, masked_forward(plain, inputs, selection.keep), selection)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], ids], 1))
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.fixture
def bare(family: str) -> str:
    """A family whose processor may put images side by side or at the end, without tokens around them."""
    if not FAMILIES[family].bare_images:
        pytest.skip("this family's processor puts tokens around images")
    return family


@pytest.mark.parametrize("ratio", [0.07, 0.25])
def test_a_prompt_that_ends_in_an_image_keeps_the_token_that_predicts_the_answer(bare, plain, model, ratio):
    inputs = make_batch(bare, "ends_in_image")
    selection = select(plain, inputs, ratio)
    assert selection.keep[0, -1]
    assert selection.vision == [15, 16]
    check_both_calls(plain, model, inputs, ratio)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_adjacent_images_have_floors_of_their_own(bare, plain, model, ratio):
    inputs = make_inputs(bare, (ADJACENT,))
    check_both_calls(plain, model, inputs, ratio)


@pytest.mark.every_family
def test_images_in_different_places_and_a_prompt_of_template_only(family, plain, model):
    inputs = make_batch(family, "different_places")
    assert (inputs["attention_mask"].sum(-1) < inputs["input_ids"].shape[1]).any()
    check_both_calls(plain, model, inputs)


def test_a_hole_in_the_mask(family, plain, model):
    """Text that the caller masks out in the middle is neither scored nor kept."""
    inputs = make_batch(family, "single")
    inputs["attention_mask"][0, 2] = 0
    check_both_calls(plain, model, inputs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].video], indirect=True)
@pytest.mark.parametrize("with_image", [False, True])
def test_video(family, plain, model, with_image):
    """A video of its own placeholder, alone and behind an image."""
    if with_image and FAMILIES[family].video_alone:
        pytest.skip("transformers takes no image beside a video")
    inputs = make_video(family, with_image)
    for ratio in (0.2, 0.5):
        check_both_calls(plain, model, inputs, ratio)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_images_of_different_sizes(plain, model, ratio):
    """Sixteen and eight tokens: the floor leaves the small image whole."""
    sixteen, eight = [IMAGE] * 16, [IMAGE] * 8
    ids = torch.tensor([[BOS, 5, BEGIN_IMAGE, *sixteen, END_IMAGE, 6, BEGIN_IMAGE, *eight, END_IMAGE, 7, 8, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64 + 32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5)),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    assert select(plain, inputs, 0.2).keep[0, -12:].all()
    check_both_calls(plain, model, inputs, ratio)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_a_processor_that_gives_no_token_types(plain, model):
    """Older processors: the model falls back to one-dimensional positions, pruned or not."""
    inputs = make_batch("qwen2_5_vl", "left_padded")
    del inputs["mm_token_type_ids"]
    selection = select(plain, inputs, 0.5)
    expected = masked_generate(plain, inputs, selection.keep, **GREEDY, max_new_tokens=5)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        forward = model(**inputs).logits
        found = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    assert_kept_logits(forward, masked_forward(plain, inputs, selection.keep), selection)
    assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1))


def test_the_first_argument_by_position(family, plain, model):
    inputs = make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    reference = masked_forward(plain, inputs, selection.keep)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        input_ids = inputs.pop("input_ids")
        assert_kept_logits(model(input_ids, **inputs).logits, reference, selection)
        logits = model(input_ids, **inputs, return_dict=False)[0]
        assert_kept_logits(logits, reference, selection)
        assert_close(model(input_ids, **inputs, logits_to_keep=1).logits, reference[:, -1:])


def test_logits_asked_for_by_column_are_mapped_or_refused(family, plain, model):
    """Columns of the original prompt do not exist in the pruned one: another token's logits would be silent."""
    inputs = make_batch(family, "two_images")
    selection = select(plain, inputs, 0.5)
    columns = torch.tensor([selection.keep.shape[1] - 30, selection.keep.shape[1] - 1])
    expected = masked_forward(plain, inputs, selection.keep)[:, columns]
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        try:
            found = model(**inputs, logits_to_keep=columns).logits
        except (ValueError, NotImplementedError) as error:
            message = str(error)
        else:
            assert_close(found, expected)
            return
    assert "logits_to_keep" in message


@pytest.mark.parametrize("family", ["phi4_multimodal"], indirect=True)
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_a_spoken_question_counts_as_text(plain, model, batch):
    """Audio tokens are scored against, kept and merged; without them another half of the image is kept."""
    inputs = make_batch("phi4_multimodal", batch)
    rows, length = inputs["input_ids"].shape
    heard = torch.tensor([[90, *[AUDIO] * 4, 91]] * rows)
    without = select(plain, inputs, 0.5).keep
    inputs["input_ids"] = torch.cat([inputs["input_ids"], heard], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(heard)], 1)
    sound = torch.randn(rows, 32, 16, generator=torch.Generator().manual_seed(3))
    inputs |= {"audio_input_features": 9 * sound, "audio_embed_sizes": torch.tensor([4] * rows)}
    assert not torch.equal(select(plain, inputs, 0.5).keep[:, :length], without), "the question must matter"
    check_both_calls(plain, model, inputs)
