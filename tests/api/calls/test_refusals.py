"""What is not supported must be refused in words that name what was found, and leave the model usable."""

from __future__ import annotations

import pytest
import torch
from checks import uniform
from tiny import FAMILIES, TEXT, make_batch
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM

import asymvlm
from asymvlm import VisionPruning
from asymvlm_kernels import UniformBudget

REFUSED = (ValueError, NotImplementedError)


def refused(model, match: str, **call: object) -> None:
    """Both ways of calling the model refuse, without a report."""
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        with torch.no_grad(), pytest.raises(REFUSED, match=match):
            model(**call)
        with pytest.raises(REFUSED, match=match):
            model.generate(**call, max_new_tokens=2)
        assert handle.last is None


def test_a_four_dimensional_mask(family, model):
    inputs = make_batch(family, "single")
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length).tril().bool()[None, None]
    refused(model, rf"2-D.*1, 1, {length}, {length}", **{**inputs, "attention_mask": mask})


def test_a_mask_of_another_length(family, model):
    inputs = make_batch(family, "single")
    longer = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=1)
    refused(model, str(longer.shape[1]), **{**inputs, "attention_mask": longer})


def test_embeddings_beside_images(family, plain, model):
    inputs = make_batch(family, "single")
    embeds = plain.get_input_embeddings()(inputs["input_ids"]).detach()
    refused(model, "inputs_embeds", **inputs, inputs_embeds=embeds)
    del inputs["input_ids"]
    refused(model, "input_ids", **inputs, inputs_embeds=embeds)


def test_a_cache_that_is_not_empty(family, plain, model):
    inputs = make_batch(family, "single")
    cache = DynamicCache(config=plain.config.get_text_config())
    with torch.no_grad():
        plain(**make_batch(family, "text_only"), past_key_values=cache)
    refused(model, "7", **inputs, past_key_values=cache)


def test_an_assistant_model(family, model):
    assistant = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1}))
    with asymvlm.patch(model, vision=uniform(0.5)), pytest.raises(REFUSED, match="assistant_model"):
        model.generate(**make_batch(family, "single"), assistant_model=assistant, max_new_tokens=2)


def test_an_unknown_family_names_the_known_ones():
    model = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(ValueError, match="bert") as error:
        asymvlm.patch(model)
    assert all(name in str(error.value) for name in FAMILIES)
    assert set(FAMILIES) <= set(asymvlm.supported_models())
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(text="question"), "question"),
        (dict(text=torch.ones(3, dtype=torch.bool)), r"\(3,\)"),
        (dict(text=torch.ones(1, 3)), "float32"),
        (dict(positions="new"), "new"),
        (dict(budget=0.5), "0.5"),
        (dict(scorer=torch.ones(2, 3)), r"\(2, 3\)"),
        (dict(scorer=torch.ones(3, dtype=torch.bfloat16)), "bfloat16"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        VisionPruning(**{"budget": UniformBudget(0.5), **settings})


def test_settings_that_do_not_fit_the_model_or_the_call(family, model):
    with pytest.raises(ValueError, match=rf"{TEXT['hidden_size']}.*\(7,\)"):
        asymvlm.patch(model, vision=uniform(0.5, scorer=torch.ones(7)))
    assert "generate" not in vars(model)
    text = torch.ones(1, 5, dtype=torch.bool)
    with asymvlm.patch(model, vision=uniform(0.5, text=text)), pytest.raises(ValueError, match=r"\(1, 5\)"):
        model(**make_batch(family, "single"))
