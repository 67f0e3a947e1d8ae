"""Methods before the decoder, each beside its rule written a second time: plain loops over one row."""

from __future__ import annotations

import math

import pytest
import torch
from checks import assert_close, uniform
from masked_reference import masked_forward, merged_embeddings
from restated import RULES, Row
from seen_prompts import seen, seen_alone
from shared_models import build_once
from tiny import make_batch
from torch import Tensor

import asymvlm
from asymvlm import ThresholdBudget, VisionPruning
from asymvlm.methods import VisionZip, find_method, image_size_for
from asymvlm.methods.before.base import BeforeMethod, VisionPrompt
from asymvlm.methods.before.downsample import grid_within

FAMILIES = ["llava", "gemma3", "qwen2_5_vl", "phi3_v"]
METHODS = ["vispruner", "flashvlm", "visionzip", "divprune", "cdpruner", "downsample"]


def counts_of(prompt: VisionPrompt, ratio: float = 0.4) -> Tensor:
    return (prompt.tokens.prunable.sum(1) * ratio).int()


def keep(method: str, prompt: VisionPrompt, ratio: float = 0.4) -> tuple[Tensor, Tensor]:
    """The mask, and the embeddings at it, fp32."""
    kept = find_method(method, BeforeMethod).keep(prompt, counts_of(prompt, ratio))
    embeds = prompt.embeds if kept.embeds is None else kept.embeds
    assert embeds.dtype == prompt.embeds.dtype
    return kept.mask, embeds.float()


def check(method: str, prompt: VisionPrompt, ratio: float, tolerance: float = 1e-5) -> None:
    mask, embeds = keep(method, prompt, ratio)
    for number, count in enumerate(counts_of(prompt, ratio).tolist()):
        wanted = RULES[method](Row(prompt, number), count) if count else {}
        assert mask[number].nonzero()[:, 0].tolist() == sorted(wanted), f"row {number}"
        for column, rows in wanted.items():
            torch.testing.assert_close(embeds[number, column].double(), rows, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_what_its_rule_says(family, method):
    # 24 of 32 tokens are more than the rank of a tower that is 16 wide: there determinants are rounding errors
    for ratio in (0.4,) if method == "cdpruner" else (0.4, 0.75):
        check(method, seen(family, "left_padded"), ratio)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", ["ends_in_image", "right_padded", "image_free_row"])
def test_the_rule_holds_where_a_prompt_ends_in_an_image_or_has_none(method, batch):
    check(method, seen("llava", batch), 0.4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_by_fp32(method, dtype):
    check(method, seen("llava", "left_padded", dtype), 0.4, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_keeps_the_same_tokens_in_any_batch(family, method):
    mask, embeds = keep(method, seen(family, "left_padded"))
    for row, prompt in enumerate(seen_alone(family, "left_padded")):
        own, rows = keep(method, prompt)
        length = own.shape[1]
        assert torch.equal(mask[row, -length:], own[0])
        assert not mask[row, :-length].any()
        assert_close(embeds[row, -length:][own[0]], rows[0][own[0]])


@pytest.mark.parametrize("family", ["llava"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_pruning_is_a_call_of_the_chosen_tokens_at_their_places(family, plain, model, method):
    inputs, prompt = make_batch(family, "single"), seen(family, "single")
    mask, embeds = keep(method, prompt, 0.5)
    short = (mask | ~prompt.tokens.prunable)[0]
    places = torch.arange(len(short))[short][None]
    with torch.no_grad():
        rows = {"inputs_embeds": embeds[:, short], "position_ids": places, "attention_mask": torch.ones_like(places)}
        wanted = plain(**rows).logits
        with asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
            found = model(**inputs).logits
        assert_close(found, wanted)
        assert handle.last.kept == [int(mask.sum())]
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits), "removal restores"
        with asymvlm.patch(model, vision=uniform(1.0, method=method)):
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits), "keep 1 is the model"


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "phi3_v"], indirect=True)
def test_pruning_by_a_set_equals_masking(family, plain, model):
    inputs, prompt = make_batch(family, "one_image_each"), seen(family, "one_image_each")
    mask = keep("vispruner", prompt, 0.5)[0] | (prompt.tokens.real & ~prompt.tokens.prunable)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method="vispruner")) as handle:
        found = model(**inputs).logits
    index = handle.last.index
    assert [[column for column in row if column >= 0] for row in index.tolist()] == [
        row.nonzero()[:, 0].tolist() for row in mask
    ]
    rows, slots = (index >= 0).nonzero(as_tuple=True)
    assert_close(found[rows, slots], masked_forward(plain, inputs, mask)[rows, index[rows, slots]])


def test_rows_without_text_keep_all_and_do_not_disturb_others():
    inputs = make_batch("llava", "one_image_each")
    text = inputs["attention_mask"].bool().clone()
    text[1] = False
    for method in ("flashvlm", "cdpruner"):
        pruned, whole = (
            asymvlm.prune_inputs(build_once("llava"), uniform(0.25, method=method, text=mask), **inputs)
            for mask in (text, "all")
        )
        kept = pruned["attention_mask"].sum(1) - whole["attention_mask"].sum(1)
        assert kept.tolist() == [0, 12, 0]
        assert torch.equal(pruned["inputs_embeds"][0, -10:], whole["inputs_embeds"][0, -10:])


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_equal_tokens_go_to_the_first_and_one_token_is_enough(family, plain):
    inputs = make_batch(family, "single")
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    embeds, columns = merged_embeddings(plain, inputs), seen(family, "single").tokens.prunable[0].nonzero()[:, 0]
    for method in METHODS:
        found = asymvlm.prune_inputs(plain, uniform(1 / 16, method=method), **inputs)
        assert found["inputs_embeds"].shape[1] == embeds.shape[1] - len(columns) + 1


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_merging_before_the_projector_is_the_same_of_what_is_projected_alone(family):
    prompt, model = seen(family, "left_padded"), build_once(family)
    places = prompt.tokens.vision & ~prompt.tokens.separators
    assert_close(prompt.project(prompt.features[places]), prompt.embeds[places])
    row, features = Row(prompt, 0), Row(prompt, 0)
    features.embeds = features.features
    count = int(counts_of(prompt)[0])
    wanted = row.whole(RULES["visionzip"](row, count))
    merged = RULES["visionzip"](features, count)
    kept = VisionZip(before_projector=True).keep(prompt, counts_of(prompt))
    assert kept.mask[0].nonzero()[:, 0].tolist() == sorted(wanted)
    for column, rows in merged.items():
        with torch.no_grad():
            assert_close(kept.embeds[0, column], model.model.multi_modal_projector(rows.float()))
    with pytest.raises(NotImplementedError, match="projector of gemma3 is not known to see one patch at a time"):
        VisionZip(before_projector=True).keep(seen("gemma3", "left_padded"), torch.tensor([6, 6, 12]))


def test_a_grid_is_no_larger_than_its_count_and_of_the_shape_of_the_image():
    found = {(count, grid): grid_within(count, grid) for count, grid in (
        (64, (24, 24)), (192, (24, 24)), (50, (24, 24)), (576, (24, 24)), (1, (24, 24)), (150, (2, 100)), (8, (4, 16)),
    )}  # fmt: skip
    wanted = [(8, 8), (13, 14), (7, 7), (24, 24), (1, 1), (2, 75), (1, 8)]
    assert list(found.values()) == wanted
    for (count, (height, width)), (rows, columns) in found.items():
        assert rows * columns <= count
        assert rows <= height
        assert columns <= width
    assert image_size_for(0.25, (1000, 700), 28) == (504, 336)  # 35 x 25 tokens to 18 x 12 of at most 218
    assert image_size_for(1, (56, 56), 28) == (56, 56)
    for arguments, told in (((0, (56, 56), 28), "keep must be"), ((0.5, (20, 56), 28), "at least 28 x 28 pixels")):
        with pytest.raises(ValueError, match=told):
            image_size_for(*arguments)


def test_what_acts_on_scores_is_refused_for_sets():
    for asked in ({"spread": asymvlm.Spread()}, {"per_image": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(asked))} acts on scores, and the method 'divprune' chooses"):
            VisionPruning(method="divprune", **asked)
    with pytest.raises(ValueError, match=r"contextual must be a share in \[0, 1\], got 2"):
        VisionZip(contextual=2)
    budget = ThresholdBudget(0.1, 0.2, 0.8, 0.5, 0.2)
    with pytest.raises(ValueError, match="divprune chooses tokens without scoring them"):
        asymvlm.prune_inputs(
            build_once("llava"), VisionPruning(method="divprune", budget=budget), **make_batch("llava", "single")
        )
    assert math.isclose(VisionZip().contextual, 10 / 64)
