"""FastV, PyramidDrop and SparseVLM, each restated in plain loops and run by hand, layer by layer."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from by_hand import ByHand, best, clusters, raters
from checks import GREEDY, assert_close
from shared_models import build_once
from tiny import make_batch, single_rows, vision_columns

import asymvlm
from asymvlm import VisionPruning
from asymvlm.methods import FastV, FastVMasked, PyramidDrop, SparseVLM, SparseVLM2, StageBudget
from asymvlm.methods.inside.density_peaks import cluster_means, density_peaks

STEPS = 4
TWO = StageBudget((1, 2), (9, 4))  # of 16 tokens, in tiny models of three layers
METHODS = {
    "fastv": FastV(2, 0.4),
    "pyramiddrop": PyramidDrop(StageBudget.shares((1, 2), (0.5, 0.25))),
    "sparsevlm": SparseVLM(TWO),
    "sparsevlm v2": SparseVLM2(TWO),
}
CASES = [
    (family, name)
    for family in ("llava", "qwen2_5_vl", "phi3_v")
    for name in METHODS
    if (family, name) != ("qwen2_5_vl", "sparsevlm")
]


def by_hand(model, inputs, name: str) -> ByHand:
    """The method of that name, a second time."""
    method, last = METHODS[name], inputs["input_ids"].shape[1] - 1
    hand = ByHand(model, inputs, method.layers, lambda seen: ([], {}))

    def rate(seen):
        ids = inputs["input_ids"][0].tolist()
        vision = [column for image in vision_columns(model, inputs["input_ids"])[0] for column in image]
        text = [c for c, token in enumerate(ids) if token != tiny.IMAGE and c > vision[0]]
        rows = [seen.place(column) for column in raters(hand.embeds, vision, text)]
        heads = seen.attention
        if name == "sparsevlm v2":
            sums = [float(head[rows][:, seen.vision].sum()) for head in heads]
            chosen = sorted(range(len(sums)), key=lambda head: -sums[head])[: len(sums) // 2]
            heads = heads[chosen]
        return heads[:, rows].mean((0, 1))

    def rule(seen):
        if name in ("fastv", "pyramiddrop"):
            scores = seen.attention[:, seen.place(last)].mean(0)
            count = 6 if name == "fastv" else 8 if seen.stage == 0 else 4
            return best(seen, scores, count), {}
        scores = rate(seen)
        stay = best(seen, scores, (9, 4)[seen.stage])
        if name == "sparsevlm v2":
            return stay, {}
        going = best(seen, scores, len(seen.vision))[len(stay) :]
        recycled = sorted(going[: len(going) * 3 // 10 + 1])
        centres, members = clusters(seen.hidden[recycled], len(recycled) // 10 + 1)
        means = [torch.stack([seen.hidden[recycled[i]] for i in member]).mean(0) for member in members]
        return stay, {recycled[centre]: mean for centre, mean in zip(centres, means, strict=True)}

    hand.rule, hand.ahead, hand.compact = rule, name == "pyramiddrop", name == "sparsevlm"
    return hand


@pytest.mark.parametrize("family, name", CASES, indirect=["family"])
def test_generation_equals_the_method_by_hand(family, plain, model, name):
    inputs = single_rows(family, "one_image_each")[1]
    hand = by_hand(plain, inputs, name)
    ids, logits = hand.greedy(STEPS)
    if (family, name) == ("llava", "sparsevlm"):
        model.set_attn_implementation("eager")
    with asymvlm.patch(model, vision=VisionPruning(method=METHODS[name])) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert handle.last.index[0].tolist() == hand.kept[-1]
    assert found.sequences[0, -STEPS:].tolist() == ids
    assert_close(torch.stack(found.logits, 1)[0], logits)
    lengths = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    first = METHODS[name].layers[0]
    assert lengths == [inputs["input_ids"].shape[1] + STEPS - 1] * first + [len(kept) + STEPS - 1 for kept in hand.kept]
    assert handle.last.method == name


def test_clusters_equal_the_rule_in_plain_loops():
    for seed, count in enumerate((1, 2, 4, 7)):
        rows = torch.randn(23, 8, generator=torch.Generator().manual_seed(seed))
        centres, member = density_peaks(rows, count)
        wanted, members = clusters(rows, count)
        assert centres.tolist() == wanted
        assert [(member == c).nonzero()[:, 0].tolist() for c in range(count)] == members
        means = torch.stack([rows[one].mean(0) for one in members])
        torch.testing.assert_close(cluster_means(rows, member, count), means, rtol=0, atol=1e-6)
    centres, member = density_peaks(torch.ones(5, 3), 2)  # equal rows: the first are centres
    assert centres.tolist() == [0, 1]
    assert member.tolist() == [0, 1, 0, 0, 0]


@pytest.fixture
def llava():
    return copy.deepcopy(build_once("llava"))


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_a_batch_is_a_batch_of_its_own(llava, name):
    inputs, rows = make_batch("llava", "left_padded"), single_rows("llava", "left_padded")
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    with asymvlm.patch(llava, vision=VisionPruning(method=METHODS[name])) as handle:
        together = llava.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        kept = [[column for column in row if column >= 0] for row in handle.last.index.tolist()]
        for number, row in enumerate(rows):
            alone = llava.generate(**row, **GREEDY, max_new_tokens=STEPS)
            assert [column + pads[number] for column in handle.last.index[0].tolist()] == kept[number]
            assert torch.equal(alone.sequences[0, -STEPS:], together.sequences[number, -STEPS:])
            assert_close(torch.stack(alone.logits, 1)[0], torch.stack(together.logits, 1)[number])


def test_a_kind_of_layer_may_begin_behind_the_dropping():
    """Gemma 3's decoder makes the full layers' mask as wide as the first of them, which holds fewer columns here."""
    model, inputs = copy.deepcopy(build_once("gemma3")), make_batch("gemma3", "image_free_row")
    text = single_rows("gemma3", "image_free_row")[1]
    expected = torch.stack(model.generate(**text, **GREEDY, max_new_tokens=STEPS).logits, 1)[0]
    with asymvlm.patch(model, vision=VisionPruning(method=FastV(1, 0.5))):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        assert_close(torch.stack(found.logits, 1)[1], expected)
        with torch.no_grad(), pytest.raises(NotImplementedError, match="2-D attention_mask of 49 columns or none, got"):
            model(
                input_ids=text["input_ids"][:, :1].expand(3, -1),
                past_key_values=found.past_key_values,
                attention_mask=torch.ones(3, 1),
            )


@pytest.mark.parametrize("family", ["llava", "phi3_v"], indirect=True)
def test_masking_answers_as_in_place_and_saves_nothing(family, model):
    inputs = make_batch(family, "one_image_each")
    found = {}
    for method in (FastV(1, 0.3), FastVMasked(1, 0.3)):
        with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(method=method)) as handle:
            logits = model(**inputs).logits
            report = handle.last
            found[method.name] = report, logits, model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    (placed, short, answer), (masked, whole, same) = found["fastv"], found["fastv masked"]
    rows, slots = (placed.index >= 0).nonzero(as_tuple=True)
    assert_close(short[rows, slots], whole[rows, placed.index[rows, slots]])
    assert torch.equal(answer.sequences, same.sequences)
    assert_close(torch.stack(answer.logits), torch.stack(same.logits))
    assert masked.kept == placed.kept == [4, 4, 4]
    assert masked.kv_bytes == masked.kv_bytes_before == placed.kv_bytes_before > placed.kv_bytes
    assert masked.flops_after == masked.flops_before > placed.flops_after
    assert masked.average_kept == [16.0] * 3
    assert placed.average_kept == [(16 + 2 * 4) / 3] * 3


def test_later_layers_hold_fewer_bytes(llava):
    inputs = make_batch("llava", "one_image_each")
    with torch.no_grad(), asymvlm.patch(llava, vision=VisionPruning(method=METHODS["pyramiddrop"])) as handle:
        cache = llava(**inputs).past_key_values
    columns = [inputs["input_ids"].shape[1] - gone for gone in (0, 8, 12)]
    assert [layer.keys.shape[2] for layer in cache.layers] == columns
    token = len(inputs["input_ids"]) * 2 * 2 * 8 * 4  # K and V, two heads of eight fp32 numbers
    assert handle.last.kv_bytes_by_layer == [token * count for count in columns]
    assert handle.last.kv_bytes == sum(handle.last.kv_bytes_by_layer)
    assert handle.last.kv_bytes_before == 3 * token * columns[0]


@pytest.mark.parametrize("name", METHODS)
def test_logits_and_a_loss_in_the_columns_of_the_prompt(llava, name):
    """As the benchmark of quality judges answers, which choose no token that they are judged by."""
    inputs = make_batch("llava", "one_image_each")
    labels, vision = inputs["input_ids"].clone(), VisionPruning(method=METHODS[name])
    labels[:, :-2] = -100
    with asymvlm.patch(llava, vision=vision) as handle:
        kept = llava(**inputs, use_cache=False).logits
        spread = handle.last.at_original_columns(kept)
    with torch.no_grad(), asymvlm.patch(llava, vision=vision, logits="original") as handle:
        assert_close(llava(**inputs, use_cache=False).logits, spread)
        judged = llava(**inputs, labels=labels, use_cache=False)
        index = handle.last.index
        wanted = torch.nn.functional.cross_entropy(judged.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert_close(judged.loss, wanted)
        answers = torch.where(labels >= 0, inputs["input_ids"] % 50 + 5, inputs["input_ids"])
        llava(**{**inputs, "input_ids": answers}, labels=labels, use_cache=False)
        assert torch.equal(handle.last.index, index)
        ids = llava.generate(**inputs, max_new_tokens=2)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2


def test_keeping_all_is_the_model_bit_for_bit(llava):
    inputs = make_batch("llava", "left_padded")
    expected = torch.stack(llava.generate(**inputs, **GREEDY, max_new_tokens=3).logits)
    everything = StageBudget.shares((1, 2), (1.0, 1.0))
    for method in (FastV(1, 1.0), FastVMasked(1, 1.0), PyramidDrop(everything), SparseVLM(everything)):
        with asymvlm.patch(llava, vision=VisionPruning(method=method)) as handle:
            found = torch.stack(llava.generate(**inputs, **GREEDY, max_new_tokens=3).logits)
        assert torch.equal(found, expected)
        assert handle.last.kept == handle.last.vision_tokens
    assert torch.equal(torch.stack(llava.generate(**inputs, **GREEDY, max_new_tokens=3).logits), expected)


def test_a_loop_goes_on_behind_the_numbers_of_each_layer(llava):
    """With a cache whose rows were moved, copied and cropped."""
    row, steps = single_rows("llava", "one_image_each")[0], 2
    ids, logits = by_hand(llava, row, "sparsevlm").greedy(2 * steps)
    inputs = make_batch("llava", "one_image_each")
    columns, length = inputs["input_ids"].shape[1], row["input_ids"].shape[1]
    with torch.no_grad(), asymvlm.patch(llava, vision=VisionPruning(method=METHODS["sparsevlm"])):
        cache = llava.generate(**inputs, **GREEDY, max_new_tokens=steps + 3).past_key_values
        cache.reorder_cache(torch.tensor([1, 0, 0]))
        cache = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="crop by a negative number, of tokens to remove, got 32"):
            cache.crop(columns + steps)
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([1]))
        for step in range(steps, 2 * steps - 1):
            found = llava(
                input_ids=torch.tensor([ids[step : step + 1]]),
                attention_mask=(torch.arange(columns + step + 1) >= columns - length).long()[None],
                position_ids=torch.tensor([[length + step]]),
                past_key_values=cache,
            )
            assert_close(found.logits[0, -1], logits[step + 1])
        with pytest.raises(ValueError, match="cannot be cropped inside a pruned prompt"):
            cache.crop(-steps * 2)


@pytest.mark.parametrize("name", METHODS)
def test_padding_on_the_right(llava, name):
    inputs, rows = make_batch("llava", "right_padded"), single_rows("llava", "right_padded")
    with torch.no_grad(), asymvlm.patch(llava, vision=VisionPruning(method=METHODS[name])) as handle:
        together, index = llava(**inputs).logits, handle.last.index
        for number, row in enumerate(rows):
            alone = llava(**row).logits[0]
            real = index[number] >= 0
            assert index[number, real].tolist() == handle.last.index[0].tolist()
            assert_close(together[number, real], alone)


def test_positions_are_numbered_anew_on_request(llava):
    """By the setting, which holds for any method."""
    inputs = single_rows("llava", "one_image_each")[0]
    hand = by_hand(llava, inputs, "fastv")
    hand.compact = True
    ids, logits = hand.greedy(STEPS)
    vision = VisionPruning(method=METHODS["fastv"], positions="compact")
    with asymvlm.patch(llava, vision=vision):
        found = llava.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert found.sequences[0, -STEPS:].tolist() == ids
    assert_close(torch.stack(found.logits, 1)[0], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(llava, dtype):
    llava.to(dtype)
    inputs = make_batch("llava", "left_padded")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for name in ("sparsevlm", "sparsevlm v2", "pyramiddrop"):
        with asymvlm.patch(llava, vision=VisionPruning(method=METHODS[name])) as handle:
            found = llava.generate(**inputs, **GREEDY, max_new_tokens=2)
        assert found.logits[0].dtype in (dtype, torch.float32)
        assert torch.stack(found.logits).isfinite().all()
        assert handle.last.kept[2] >= 8 + 8  # two images, each with its floor
