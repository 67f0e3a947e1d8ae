"""A keep ratio of 1 must not change a bit."""

from __future__ import annotations

import pytest
import torch
from checks import FORWARDED, GENERATED, GREEDY, uniform
from tiny import FAMILIES, make_batch, make_labels

import asymvlm
from asymvlm import VisionPruning
from asymvlm_kernels import ThresholdBudget


@pytest.mark.every_family
@pytest.mark.parametrize("batch", FORWARDED)
def test_logits_and_loss_are_bitwise_the_models(family, plain, model, batch):
    inputs = make_batch(family, batch)
    labels = make_labels(inputs)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(1.0)):
        found = model(**inputs, labels=labels)
        expected = plain(**inputs, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.every_family
@pytest.mark.parametrize("batch", GENERATED)
def test_generation_is_bitwise_the_models(family, plain, model, batch):
    inputs = make_batch(family, batch)
    expected = plain.generate(**inputs, **GREEDY, max_new_tokens=8)
    with asymvlm.patch(model, vision=uniform(1.0)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == 8
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_sampling_draws_the_same_tokens(family, plain, model):
    inputs = make_batch(family, "left_padded")
    options = dict(do_sample=True, num_return_sequences=2, max_new_tokens=8)
    torch.manual_seed(0)
    expected = plain.generate(**inputs, **options)
    torch.manual_seed(0)
    with asymvlm.patch(model, vision=uniform(1.0)):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_calls_that_pruning_would_refuse(family, plain, model):
    inputs = make_batch(family, "single")
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(length, length).tril().bool()[None, None]
    if FAMILIES[family].mrope:
        inputs["position_ids"] = torch.arange(length).expand(3, 1, length)  # not derived from such a mask
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(1.0)):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_a_threshold_budget_that_keeps_everything(family, plain, model):
    inputs = make_batch(family, "single")
    budget = ThresholdBudget(1e8, 1e9, conservative=1.0, moderate=0.5, aggressive=0.25)
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(budget=budget)):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
