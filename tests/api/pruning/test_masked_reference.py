"""The oracle itself: it closes exactly the dropped columns, leaves the model alone, and selects by the book."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import assert_close
from masked_reference import (
    closed_columns,
    count,
    importance,
    importance_gap,
    index_of,
    masked_forward,
    masked_generate,
    masked_greedy,
    select,
)
from tiny import BATCHES, make_batch, single_rows, text_layers, vision_columns
from torch import Tensor
from transformers import PreTrainedModel


def logits_with_noise(model: PreTrainedModel, inputs: dict, keep: Tensor, noisy: Tensor) -> Tensor:
    """The masked forward with the merged embeddings of ``noisy`` (B, S) replaced by noise."""

    def disturb(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(9))
        return (torch.where(noisy[..., None], noise, args[0]), *args[1:]), kwargs

    hook = text_layers(model)[0].register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        return masked_forward(model, inputs, keep)
    finally:
        hook.remove()


@pytest.mark.parametrize("batch", BATCHES)
def test_keeping_every_token_is_the_plain_forward(family, plain, batch):
    inputs = make_batch(family, batch)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = plain(**inputs, use_cache=False).logits
    found = masked_forward(plain, inputs, torch.ones_like(real))
    assert_close(found[real], expected[real])


@pytest.mark.every_family
@pytest.mark.parametrize("batch", ["single", "two_images", "left_padded", "image_free_row"])
def test_keeping_every_token_is_plain_greedy_generation(family, plain, batch):
    inputs = make_batch(family, batch)
    everything = torch.ones_like(inputs["attention_mask"]).bool()
    ids, logits = masked_greedy(plain, inputs, everything, steps=8)
    expected = plain.generate(
        **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(ids, expected.sequences[:, -8:])
    assert_close(logits, torch.stack(expected.logits, 1))
    assert all(len(set(row)) > 2 for row in ids.tolist()), "a constant answer would hide errors"


@pytest.mark.every_family
@pytest.mark.parametrize("batch", ["single", "left_padded", "right_padded"])
def test_only_kept_tokens_reach_kept_logits(family, plain, batch):
    inputs = make_batch(family, batch)
    real = inputs["attention_mask"].bool()
    keep = select(plain, inputs, 0.5).keep
    logits = masked_forward(plain, inputs, keep)
    without_dropped = logits_with_noise(plain, inputs, keep, noisy=real & ~keep)
    assert_close(without_dropped[keep], logits[keep])
    with torch.no_grad():
        assert (plain(**inputs).logits - logits)[keep].abs().max() > 0.1, "dropping half must matter"
    for column in itertools.chain(*vision_columns(plain, inputs["input_ids"])[0]):
        if not keep[0, column]:
            continue
        noisy = torch.zeros_like(keep)
        noisy[0, column] = True
        assert (logits_with_noise(plain, inputs, keep, noisy) - logits)[keep & ~noisy].abs().max() > 1e-3


@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_generate_with_closed_columns_is_the_recomputed_greedy_loop(family, plain, batch):
    inputs = make_batch(family, batch)
    keep = select(plain, inputs, 0.5).keep
    ids, logits = masked_greedy(plain, inputs, keep, steps=6)
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = masked_generate(plain, inputs, keep, **options, **cache)
        assert torch.equal(out.sequences[:, -6:], ids)
        assert_close(torch.stack(out.logits, 1), logits)


def test_closed_columns_restores_the_configuration_after_an_error(family, plain):
    before = plain.config.to_dict(), plain.config.get_text_config()._attn_implementation
    with pytest.raises(ZeroDivisionError), closed_columns(plain, torch.ones(1, 1, dtype=torch.bool)):
        raise ZeroDivisionError
    assert (plain.config.to_dict(), plain.config.get_text_config()._attn_implementation) == before


def test_rows_are_selected_alone_as_in_their_batch(family, plain):
    whole = select(plain, make_batch(family, "left_padded"), 0.5)
    for b, single in enumerate(single_rows(family, "left_padded")):
        alone = select(plain, single, 0.5)
        shift = whole.keep.shape[1] - alone.keep.shape[1]
        kept = whole.index[b][whole.index[b] >= 0]
        assert torch.equal(kept - shift, alone.index[0])


def test_importance_is_equation_1():
    embeds = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [4.0, 3.0]])
    vision = torch.tensor([True, True, False, True, False])
    scores = importance(embeds, vision, ~vision, weight=torch.tensor([1.0, 2.0]))
    half = 2**-0.5
    expected = torch.tensor([max(half, 0.8), max(2 * half, 1.2), 0.0], dtype=torch.double)
    torch.testing.assert_close(scores[vision], expected, rtol=0, atol=1e-7)
    assert scores[~vision].isinf().all()


def test_count_gap_and_padding_by_hand():
    assert [count(90, 0.7), count(10, 0.05), count(10, 1.0), count(100, 0.29)] == [63, 1, 10, 29]
    assert importance_gap(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0])) == pytest.approx(8.0 - 2.0)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    real = torch.tensor([[True, True, True], [False, True, True]])
    vision = real & ~keep
    assert index_of(keep, real, vision).tolist() == [[0, 2], [-1, 2]]
    assert index_of(keep.flip(1), real.flip(1), vision.flip(1)).tolist() == [[0, 2], [0, -1]]
    keep, real = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool(), torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
    assert index_of(keep, real, real & ~keep).tolist() == [[1, -1, 4, -1]]


@pytest.mark.parametrize(
    "ratio, kept", [(0.1, [8, 8]), (0.5, [8, 8]), (0.75, [24])], ids=["raised", "all floors", "ranked"]
)
def test_every_image_keeps_its_best_eight(family, plain, ratio, kept):
    inputs = make_batch(family, "two_images")
    selection = select(plain, inputs, ratio)
    columns = torch.tensor(vision_columns(plain, inputs["input_ids"])[0])
    per_image = selection.keep[0, columns].sum(-1).tolist()
    assert per_image == kept if len(kept) == 2 else sum(per_image) == kept[0] and min(per_image) >= 8
    for image in columns:
        best = selection.scores[0, image].topk(8).indices
        assert selection.keep[0, image[best]].all()
