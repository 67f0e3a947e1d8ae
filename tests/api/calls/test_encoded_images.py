"""Images that come encoded (``mm_encoder_outputs``) are pruned as those that come as pixels."""

from __future__ import annotations

import inspect

import pytest
import torch
from checks import uniform
from tiny import make_batch

import asymvlm
from asymvlm.models.adapter import ENCODED

PIXELS = ("pixel_values", "image_grid_thw", "image_sizes")


def encoded(model, inputs):
    """The call with its images seen by the tower already."""
    accepted = inspect.signature(type(model.model).get_image_features).parameters
    images = {name: inputs[name] for name in PIXELS if name in inputs and name in accepted}
    with torch.no_grad():
        features = model.model.get_image_features(**images, return_dict=True)
    return {name: value for name, value in inputs.items() if name != "pixel_values"} | {ENCODED: {"image": features}}


@pytest.mark.parametrize("generating", [True, False])
def test_encoded_images_are_pruned_as_pixels_are(family, model, generating):
    if ENCODED not in inspect.signature(type(model.model).forward).parameters:
        pytest.skip("this transformers takes no encoded images")
    inputs = make_batch(family, "single")
    given = encoded(model, inputs)

    def run(call):
        if generating:
            return model.generate(**call, do_sample=False, max_new_tokens=4)
        with torch.no_grad():
            return model(**call).logits

    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        wanted = run(inputs)
        kept = handle.last.index.clone()
        handle.last = None
        found = run(given)
        assert handle.last is not None, "a call that has images reports"
        assert torch.equal(handle.last.index, kept)
        assert max(handle.last.kept) < max(handle.last.vision_tokens)
        assert handle.last.vision_flops == 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["phi4_multimodal"], indirect=True)
def test_a_family_that_merges_by_itself_wants_pixels(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model), pytest.raises(NotImplementedError, match="pass pixels, not mm_encoder_outputs"):
        model.generate(input_ids=inputs["input_ids"], **{ENCODED: {"image": torch.zeros(1)}}, max_new_tokens=1)
