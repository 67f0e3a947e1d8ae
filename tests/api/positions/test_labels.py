"""Labels must be pruned with their tokens: the loss is the masked reference's over the kept ones."""

from __future__ import annotations

import pytest
import torch
from checks import FORWARDED, assert_close, uniform
from masked_reference import masked_forward, select, take
from tiny import IMAGE, make_batch, make_labels
from torch.nn.functional import cross_entropy

import asymvlm


@pytest.mark.parametrize("batch", FORWARDED)
def test_loss_is_the_masked_references(family, plain, model, batch):
    inputs = make_batch(family, batch)
    labels = make_labels(inputs)
    selection = select(plain, inputs, 0.5, text_mask=labels == -100)
    logits = take(masked_forward(plain, inputs, selection.keep), selection.index)
    targets = take(labels, selection.index, pad=-100)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        found = model(**inputs, labels=labels).loss
        unpruned = plain(**inputs, labels=labels).loss
    assert_close(found, expected)
    assert (unpruned - expected).abs() > 1e-4, "pruning must matter to the loss"


def test_labels_of_dropped_tokens_are_dropped(family, plain, model):
    inputs = make_batch(family, "single")
    labels = make_labels(inputs)
    selection = select(plain, inputs, 0.5, text_mask=labels == -100)
    everywhere = labels.masked_fill(~selection.keep, 7)
    assert (everywhere != labels).any()
    assert (inputs["input_ids"][~selection.keep] == IMAGE).all()
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        assert torch.equal(model(**inputs, labels=everywhere).loss, model(**inputs, labels=labels).loss)


def test_the_loss_trains_the_language_model(family, plain, model):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.5)):
        model(**inputs, labels=make_labels(inputs)).loss.backward()
    weights = {"head": model.lm_head.weight, "layer 0": next(model.get_decoder().layers[0].parameters())}
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert 0 < weight.grad.abs().sum() < torch.inf, name


def test_an_answer_does_not_choose_the_tokens_it_is_judged_by(family, plain, model):
    """Of one question with two answers the losses judge one image; without labels the two differ somewhere."""
    inputs = make_batch(family, "single")
    labels = make_labels(inputs)
    chosen, free = [], []
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        for seed in range(6):
            drawn = torch.randint(5, 90, labels.shape, generator=torch.Generator().manual_seed(seed))
            answered = {**inputs, "input_ids": torch.where(labels == -100, inputs["input_ids"], drawn)}
            model(**answered, labels=labels)
            chosen.append(handle.last.index.tolist())
            model(**answered)
            free.append(handle.last.index.tolist())
    assert all(kept == chosen[0] for kept in chosen)
    assert any(kept != free[0] for kept in free)


def test_labels_of_another_shape_are_refused(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)), pytest.raises(ValueError, match="labels must have the shape of"):
        model(**inputs, labels=make_labels(inputs)[:, 1:])
