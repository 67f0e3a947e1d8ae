"""Pruning must equal masking: same tokens as the method selects, same logits as with their columns closed."""

from __future__ import annotations

import pytest
import torch
from checks import FORWARDED, GENERATED, GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import Selection, masked_forward, masked_greedy, select
from tiny import IMAGE, TEXT, make_batch, vision_columns
from torch import Tensor

import asymvlm


def last_text_tokens(inputs: dict[str, Tensor], number: int) -> Tensor:
    """A text mask as a caller would build one for a question: the last real text tokens of each row."""
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    from_the_end = text.flip(-1).cumsum(-1).flip(-1)
    return text & (from_the_end <= number)


def check_forward(plain, model, inputs: dict[str, Tensor], selection: Selection, **settings: object) -> None:
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(**settings)) as handle:
        found = model(**inputs).logits
    assert torch.equal(handle.last.index, selection.index)
    assert_kept_logits(found, masked_forward(plain, inputs, selection.keep), selection)


@pytest.mark.every_family
@pytest.mark.parametrize("batch", FORWARDED)
def test_forward(family, plain, model, batch):
    inputs = make_batch(family, batch)
    check_forward(plain, model, inputs, select(plain, inputs, 0.5), ratio=0.5)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.8])
@pytest.mark.parametrize("batch", FORWARDED)
def test_other_ratios(family, plain, model, batch, ratio):
    inputs = make_batch(family, batch)
    check_forward(plain, model, inputs, select(plain, inputs, ratio), ratio=ratio)


@pytest.mark.every_family
@pytest.mark.parametrize("batch", GENERATED)
def test_greedy_generation_step_by_step(family, plain, model, batch):
    inputs = make_batch(family, batch)
    selection = select(plain, inputs, 0.5)
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=8)
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert torch.equal(handle.last.index, selection.index)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], ids], 1))
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("batch", ["single", "left_padded", "right_padded"])
def test_only_the_given_text_is_scored(family, plain, model, batch):
    inputs = make_batch(family, batch)
    question = last_text_tokens(inputs, 2)
    selection = select(plain, inputs, 0.5, text_mask=question)
    assert not torch.equal(selection.index, select(plain, inputs, 0.5).index), "the mask must matter"
    check_forward(plain, model, inputs, selection, text=question)


def test_the_weight_changes_the_ranking(family, plain, model):
    inputs = make_batch(family, "left_padded")
    weight = torch.rand(TEXT["hidden_size"], generator=torch.Generator().manual_seed(1)) * 3
    selection = select(plain, inputs, 0.5, weight=weight)
    assert not torch.equal(selection.index, select(plain, inputs, 0.5).index), "the weight must matter"
    check_forward(plain, model, inputs, selection, scorer=weight)


def test_the_lowest_index_wins_ties(family, plain, model):
    inputs = make_batch(family, "single")
    no_weight = torch.zeros(TEXT["hidden_size"])
    selection = select(plain, inputs, 0.25, weight=no_weight)
    first = vision_columns(plain, inputs["input_ids"])[0][0][:4]
    assert set(first) < set(selection.index[0].tolist())
    assert selection.kept == [4]
    check_forward(plain, model, inputs, selection, ratio=0.25, scorer=no_weight)


def test_per_image_ranks_each_image_by_itself(family, plain, model):
    inputs = make_batch(family, "two_images", seed=9)
    scores = select(plain, inputs, 1.0).scores[0]
    images = torch.tensor(vision_columns(plain, inputs["input_ids"])[0])
    best = torch.cat([image[scores[image].topk(10).indices] for image in images])
    keep = torch.ones_like(inputs["input_ids"]).bool()
    keep[0, images] = False
    keep[0, best] = True
    assert not torch.equal(select(plain, inputs, 0.625).keep, keep), "ranking by image must matter"
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.625, per_image=True)) as handle:
        found = model(**inputs).logits
    assert handle.last.index.tolist() == keep.nonzero()[None, :, 1].tolist()
    assert_close(found[0], masked_forward(plain, inputs, keep)[keep])


def test_a_row_without_scored_text_keeps_everything(family, plain, model):
    inputs = make_batch(family, "left_padded")
    question = last_text_tokens(inputs, 3)
    question[1] = False
    selection = select(plain, inputs, 0.5, text_mask=question)
    assert selection.kept == [8, 16, 16]
    check_forward(plain, model, inputs, selection, text=question)
