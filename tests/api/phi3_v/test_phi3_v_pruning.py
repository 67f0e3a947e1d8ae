"""Pruning Phi-3.5-Vision: the same matrix as for the other families, with separators that always stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from checks import GREEDY, assert_close, assert_kept_logits, one_tier_each, uniform
from masked_reference import masked_forward, masked_generate, masked_greedy, take
from model_state import changes, snapshot
from phi3_v_tiny import GENERATED, is_separator, make_batch, select, single_rows, tiny_model
from transformers import DynamicCache

import asymvlm
from asymvlm import VisionPruning

FORWARDED = [*GENERATED, "right_padded"]
IDS = dict(do_sample=False, max_new_tokens=6)


@pytest.fixture
def plain() -> Iterator[torch.nn.Module]:
    model = tiny_model()
    before = snapshot(model)
    yield model
    assert not changes(before, snapshot(model)), "a test changed the shared model"


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


def renumbered(keep: torch.Tensor) -> torch.Tensor:
    return (keep.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("batch", FORWARDED)
def test_keeping_everything_is_bitwise_the_model(plain, model, batch):
    inputs = make_batch(batch)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] < 0) | (inputs["attention_mask"] == 0), -100)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(1.0)):
        found, expected = model(**inputs, labels=labels), plain(**inputs, labels=labels)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        if batch in GENERATED:
            found = model.generate(**inputs, **GREEDY, max_new_tokens=6)
            expected = plain.generate(**inputs, **GREEDY, max_new_tokens=6)
            assert torch.equal(found.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.8])
@pytest.mark.parametrize("batch", FORWARDED)
def test_forward_equals_closed_columns(plain, model, batch, ratio):
    inputs = make_batch(batch)
    selection = select(plain, inputs, ratio)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(ratio)) as handle:
        found = model(**inputs).logits
    assert torch.equal(handle.last.index, selection.index)
    assert handle.last.kept == selection.kept
    assert handle.last.vision_tokens == selection.vision
    assert_kept_logits(found, masked_forward(plain, inputs, selection.keep), selection)


@pytest.mark.parametrize("batch", GENERATED)
def test_generation_equals_closed_columns_step_by_step(plain, model, batch):
    inputs = make_batch(batch)
    selection = select(plain, inputs, 0.5)
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=8)
    unpruned = plain.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert (torch.stack(unpruned.logits, 1) - logits).abs().max() > 1e-3, "pruning must matter"
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=8)
    assert torch.equal(handle.last.index, selection.index)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], ids], 1))
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("batch", ["single", "left_padded", "right_padded"])
def test_separators_survive_and_are_not_scored(plain, model, batch):
    inputs = make_batch(batch)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.01)) as handle:
        model(**inputs)
    for b, separators in enumerate(is_separator(inputs)):
        assert set(separators.nonzero()[:, 0].tolist()) <= set(handle.last.index[b].tolist())
        assert (handle.last.scores[b, separators] == -torch.inf).all()


def test_images_share_a_budget_with_a_floor_each(plain, model):
    """The floor is an image's, not a view's: crops and global view of one image compete."""
    inputs = make_batch("two_images")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.01)) as handle:
        model(**inputs)
    kept = inputs["input_ids"][0, handle.last.index[0]]
    separators = is_separator(inputs)[0, handle.last.index[0]]
    assert [int((kept[~separators] == image).sum()) for image in (-1, -2)] == [8, 8]


def test_the_report_has_a_grid_for_the_crops_and_one_for_the_global_view(model):
    inputs = make_batch("left_padded")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        model(**inputs)
    assert handle.last.image_grids == [[(4, 4), (2, 2)], [(2, 6), (2, 2)], [(4, 2), (2, 2), (2, 8), (2, 2)]]
    from asymvlm.report.plot import patch_grid

    scores, kept, grid = patch_grid(handle.last, row=2, image_number=2)
    columns = ((inputs["input_ids"] == -2) & ~is_separator(inputs))[2].nonzero()[:16, 0]
    assert torch.equal(scores, handle.last.scores[2, columns].view(2, 8))
    assert kept.flatten().tolist() == [column in handle.last.index[2].tolist() for column in columns.tolist()]
    views = 1 + 4 + 1 + 3 + 1 + 2 + 1 + 4
    n, d, m, layers = 17, 16, 32, 3
    assert handle.last.vision_flops == views * layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)


def test_a_row_does_not_depend_on_its_batch(plain, model):
    inputs = make_batch("left_padded")
    gaps = select(plain, inputs, 1.0).gap
    with asymvlm.patch(model, vision=VisionPruning(budget=one_tier_each(gaps))) as handle:
        whole = model.generate(**inputs, **GREEDY, max_new_tokens=6)
        in_batch = handle.last
        for b, row in enumerate(single_rows("left_padded")):
            alone = model.generate(**row, **GREEDY, max_new_tokens=6)
            assert torch.equal(whole.sequences[b, -6:], alone.sequences[0, -6:])
            assert_close(torch.stack(whole.logits, 1)[b], torch.stack(alone.logits, 1)[0])
            assert handle.last.kept == [in_batch.kept[b]]
    assert len(set(in_batch.tier)) == 3


@pytest.mark.parametrize("batch", GENERATED)
def test_the_decoder_sees_kept_tokens_only_and_the_tower_runs_once(plain, model, batch):
    inputs = make_batch(batch)
    kept = select(plain, inputs, 0.5).index.shape[1]
    assert kept < inputs["input_ids"].shape[1]
    lengths: list[int] = []
    views: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.model.vision_embed_tokens.img_processor.register_forward_pre_hook(lambda _, args: views.append(len(args[0])))
    with asymvlm.patch(model, vision=uniform(0.5)):
        out = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert lengths == [kept, 1, 1, 1]
    sizes = inputs["image_sizes"] // 56
    assert views == [int((1 + sizes.prod(-1)).sum())], "unused crops must not reach the tower"
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [kept + 3] * 3


OPTIONS = {
    "sampling": dict(do_sample=True, top_k=12, num_return_sequences=2, max_new_tokens=6),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2, max_new_tokens=6),
    "static_cache": dict(cache_implementation="static", **IDS),
    "no_cache": dict(use_cache=False, **IDS),
    "repetition_penalty": dict(repetition_penalty=1.5, **IDS),
    "min_new_tokens": dict(do_sample=False, min_new_tokens=4, max_new_tokens=6),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_generate_options(plain, model, batch, options):
    inputs = make_batch(batch)
    keep = select(plain, inputs, 0.5).keep
    torch.manual_seed(0)
    expected = masked_generate(plain, inputs, keep, **options)
    torch.manual_seed(0)
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("options", [dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=5)], ids=str)
def test_drafts_and_chunks(plain, model, options):
    inputs = make_batch("single")
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=10)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, do_sample=False, max_new_tokens=10, **options)
    assert torch.equal(found, torch.cat([inputs["input_ids"], ids], 1))


def test_a_draft_that_runs_into_the_image_is_rejected(plain, model):
    """The question's last tokens stand before the image too, so the lookup proposes placeholders."""
    inputs = make_batch("single")
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, 2:4]
    ids, _ = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5)):
        found = model.generate(**inputs, **IDS, prompt_lookup_num_tokens=4)
    assert torch.equal(found[:, -6:], ids)


def test_max_length_counts_the_original_prompt(plain, model):
    inputs = make_batch("left_padded")
    length = inputs["input_ids"].shape[1] + 5
    expected = masked_generate(plain, inputs, select(plain, inputs, 0.5).keep, do_sample=False, max_length=length)
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_length=length), expected)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("user_cache", [True, False])
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_a_loop_by_hand(plain, model, batch, with_mask, user_cache):
    if batch == "left_padded" and not with_mask:
        pytest.skip("padding without a mask")
    inputs = make_batch(batch)
    _, expected = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=5)
    mask, call, found = inputs.pop("attention_mask"), inputs, []
    cache = {"past_key_values": DynamicCache(config=model.config)} if user_cache else {}
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        for _ in range(5):
            out = model(**call, **cache, **({"attention_mask": mask} if with_mask else {}), use_cache=True)
            found.append(out.logits[:, -1])
            call, cache = {"input_ids": found[-1].argmax(-1, keepdim=True)}, {"past_key_values": out.past_key_values}
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert_close(torch.stack(found, 1), expected)


@pytest.mark.parametrize("batch", ["single", "right_padded"])
def test_loss(plain, model, batch):
    """The loss is over kept text tokens that follow a kept token, as with labels of dropped tokens left out."""
    inputs = make_batch(batch)
    ids = inputs["input_ids"]
    prompt = (ids < 0).flip(-1).cumsum(-1).flip(-1) > 0  # the text behind the last image is the answer
    labels = ids.masked_fill(prompt | (inputs["attention_mask"] == 0), -100)
    selection = select(plain, inputs, 0.5, labels)
    logits = take(masked_forward(plain, inputs, selection.keep), selection.index)
    targets = take(labels, selection.index, pad=-100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        assert_close(model(**inputs, labels=labels).loss, expected)


@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_compact_positions(plain, model, batch):
    inputs = make_batch(batch)
    keep = select(plain, inputs, 0.5).keep
    ids, logits = masked_greedy(plain, inputs, keep, steps=6, position_ids=renumbered(keep))
    _, original = masked_greedy(plain, inputs, keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5, positions="compact")):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=6)
    assert torch.equal(found.sequences[:, -6:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert (logits - original)[:, 0].abs().max() > 1e-3, "positions must matter"


@pytest.mark.parametrize("mutation", ["no mask", "a separator dropped", "two tokens swapped"])
def test_a_broken_part_shows(plain, mutation):
    inputs = make_batch("single")
    selection = select(plain, inputs, 0.5)
    expected = take(masked_forward(plain, inputs, selection.keep), selection.index)
    pruned = asymvlm.prune_inputs(plain, vision=uniform(0.5), **inputs)
    with torch.no_grad():
        assert_close(plain(**pruned, use_cache=False).logits, expected)
        if mutation == "no mask":
            del pruned["attention_mask"]
        elif mutation == "a separator dropped":
            separator = int(take(is_separator(inputs), selection.index)[0].nonzero()[0])
            pruned["attention_mask"][0, separator] = 0
        else:
            pruned["inputs_embeds"][0, [5, 8]] = pruned["inputs_embeds"][0, [8, 5]]
        found = plain(**pruned, use_cache=False).logits
    assert (found - expected)[0, -1].abs().max() > 1e-3


def test_text_only_calls_are_untouched(plain, model):
    text = make_batch("text_only")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        model.generate(**make_batch("two_images"), max_new_tokens=2)
        assert torch.equal(model(**text).logits, plain(**text).logits)
        assert torch.equal(model.generate(**text, **IDS), plain.generate(**text, **IDS))


def test_removal_and_errors_leave_nothing(plain, model):
    inputs = make_batch("left_padded")
    before = snapshot(model)
    expected = plain.generate(**inputs, **IDS)
    handle = asymvlm.patch(model, vision=uniform(0.5))
    with pytest.raises(RuntimeError, match="patched"):
        asymvlm.patch(model, vision=uniform(0.5))
    with pytest.raises(ValueError, match="image placeholders, one a token"):
        model.generate(**{**inputs, "input_ids": inputs["input_ids"].clamp(min=-1)[:, :-1]} | _short(inputs))
    model.generate(**inputs, **IDS)
    twin = copy.deepcopy(model)
    handle.remove()
    assert not changes(before, snapshot(model))
    assert torch.equal(model.generate(**inputs, **IDS), expected)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    keep = select(plain, inputs, 0.5).keep
    assert torch.equal(twin.generate(**inputs, **IDS), masked_generate(plain, inputs, keep, **IDS))


def _short(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One image less than the ids announce."""
    return {name: inputs[name][1:] for name in ("pixel_values", "image_sizes")} | {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
    }
