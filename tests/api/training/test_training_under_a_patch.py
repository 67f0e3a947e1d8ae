"""Training through a patched model: adapters and decoder learn, and what cannot is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_batch, make_labels
from torch.nn.parallel import DataParallel

import asymvlm


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_adapters_get_a_gradient_with_any_checkpointing(family, model, reentrant):
    inputs = make_batch(family, "left_padded")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*layers.*\.q_proj", init_lora_weights=False))
    tower = asymvlm.models.adapter_for(model)
    adapters = [p for name, p in lora.named_parameters() if "lora" in name and name.count(".layers.")]
    decoder = [p for p in tower.text_of(model).parameters() if any(p is adapter for adapter in adapters)]
    for parameter in adapters:
        parameter.requires_grad_(any(parameter is mine for mine in decoder))
    if reentrant is not None:
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
    lora.train()
    with asymvlm.patch(lora, keep=0.5):
        lora(**inputs, labels=make_labels(inputs), use_cache=False).loss.backward()
    assert decoder
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in decoder)


def test_what_gets_no_gradient_may_not_ask_for_one(family, model):
    inputs = make_batch(family, "single")
    labels = make_labels(inputs)
    model.train()
    with asymvlm.patch(model, keep=0.5):
        with pytest.raises(RuntimeError, match="asks for a gradient, and a patched model has none"):
            model(**inputs, labels=labels)
        with torch.no_grad():
            assert torch.isfinite(model(**inputs, labels=labels).loss)
        model.requires_grad_(False)
        asymvlm.hf.decoder.decoder_of(model).layers.requires_grad_(True)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in asymvlm.hf.decoder.decoder_of(model).layers[0].parameters())


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_wrappers_that_pass_by_the_patch_are_refused(family, model):
    with pytest.raises(TypeError, match=r"patch it first and torch\.compile it then"):
        asymvlm.patch(torch.compile(model))
    with pytest.raises(TypeError, match=r"patch the model inside \(.module\)"):
        asymvlm.patch(DataParallel(model))
