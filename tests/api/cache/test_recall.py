"""Vision tokens that come back before a later question: equal to a run over the whole conversation, by two oracles."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, set_tolerance, uniform
from masked_reference import select
from recalling import ANSWER, KEEP, LEAVE, NEVER, STAY, Talk
from test_later_images import two_turns
from test_multi_turn import longer, without_images
from tiny import FAMILIES, make_batch
from transformers import StaticCache

import asymvlm
from asymvlm import Recall, RelativeThresholdBudget, Spread, VisionPruning
from asymvlm.methods import BeforeMethod

SERVED = ["llava", "gemma3", "qwen2_5_vl", "phi3_v"]
REFUSING = {"qwen3_5": "recurrent", "qwen3_5_moe": "recurrent", "lfm2_vl": "recurrent", "llama4": "chunks"}


class ByTower(BeforeMethod):
    needs_text = needs_tower = True

    def scores(self, prompt):
        raise AssertionError


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_family(family, plain, model):
    """Rows of different lengths recall different numbers: first beside K/V that are kept, then all are computed."""
    inputs = make_batch(family, "left_padded")
    if family in REFUSING:
        with pytest.raises(NotImplementedError, match=f"recall does not serve {family}.*{REFUSING[family]}"):
            asymvlm.patch(model, vision=uniform(0.25, recall=True))
        return
    with asymvlm.patch(model, vision=uniform(0.25, recall=KEEP)) as handle:
        talk = Talk(family, plain, handle, inputs)
        came = talk.ask()
        handle.vision = uniform(0.25, recall=True)
        assert sum(came + talk.ask(STAY)) > 0
        assert sum(handle.last.recall.computed) > sum(handle.last.recall.recalled)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "phi3_v"], indirect=True)
def test_tokens_that_are_not_wanted_leave(family, plain, model):
    """The budget holds for every question: as many leave as come back. From host memory, too."""
    with asymvlm.patch(model, vision=uniform(0.25, recall=Recall("host", unwanted="leave"))) as handle:
        talk = Talk(family, plain, handle, make_batch(family, "left_padded"))
        kept = []
        for _ in range(2):
            assert sum(talk.ask(handle.vision.recall)) > 0
            assert handle.last.recall.left == handle.last.recall.recalled
            kept.append(handle.last.kept)
        assert kept[0] == kept[1]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_background_stays_where_what_is_not_wanted_leaves(family, model):
    """Tokens least like the new question, as many as the first prompt kept beside a quarter of the others."""
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.25, recall=LEAVE, background=2)) as handle:
        said = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        first = handle.last.kept
        asked = without_images(longer(family, inputs, said.sequences))
        model.generate(**asked, past_key_values=said.past_key_values, **GREEDY, max_new_tokens=ANSWER)
    assert sum(handle.last.recall.left) > 0
    assert handle.last.kept == first


@pytest.mark.parametrize("family", SERVED, indirect=True)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_images(family, plain, model, attention):
    """From host memory, too."""
    model.set_attn_implementation({"text_config": attention} if attention != "sdpa" else "sdpa")
    recall = Recall("host") if attention == "sdpa" else LEAVE
    with asymvlm.patch(model, vision=uniform(0.25, recall=recall, per_image=True)) as handle:
        talk = Talk(family, plain, handle, make_batch(family, "two_images"))
        assert handle.last.recall.stored_on == "cpu"
        assert handle.last.recall.stored_bytes > 0
        assert sum(talk.ask(recall)) > 0


@pytest.mark.parametrize("family, window", [("gemma3", 33), ("mistral3", 41)], ids=str)
@pytest.mark.parametrize("recall", [KEEP, STAY], ids=["keep", "recompute"])
def test_windows_reach_as_far_as_in_the_unpruned_conversation(family, window, recall):
    """Also where columns leave the window as tokens come back; once they are gone, nothing more can come."""
    set_tolerance(FAMILIES[family].atol)
    plain = tiny.build(family, sliding_window=window)
    with asymvlm.patch(copy.deepcopy(plain), vision=uniform(0.25, recall=recall)) as handle:
        talk = Talk(family, plain, handle, make_batch(family, "left_padded"))
        assert sum(talk.ask(recall)) > 0
        assert talk.ask(recall, forgotten=True) == [0, 0, 0]


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_images_of_a_later_turn_come_back_beside_those_of_the_first(family, plain, model):
    with asymvlm.patch(model, vision=uniform(0.25, recall=KEEP)) as handle:
        talk = Talk(family, plain, handle, make_batch(family, "left_padded"))
        turns = two_turns(family, "left_padded", talk.result.sequences[:, -ANSWER:])
        kept = select(plain, turns.whole, 0.25, first=turns.known - 1).keep
        talk.generate(turns.new_images, past_key_values=talk.result.past_key_values)
        assert "images of its own" in handle.last.recall.note
        first, talk.turn, talk.inputs = talk.when, 1, turns.whole
        talk.when = torch.where(kept | ~turns.whole["attention_mask"].bool(), 1, NEVER)
        talk.when[:, : first.shape[1]] = first
        talk.when[:, first.shape[1] : turns.known - 1] = 0
        assert sum(talk.ask()) > 0
        handle.vision = uniform(0.25, recall=LEAVE)
        assert len(talk.ask(LEAVE)) == 3
        assert sum(handle.last.recall.left) > 0


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_row_does_not_depend_on_others(family, plain, model):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.25, recall=LEAVE)) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        conversation = without_images(longer(family, inputs, result.sequences))
        kwargs = dict(past_key_values=result.past_key_values, **GREEDY, max_new_tokens=ANSWER)
        found, recalled = model.generate(**conversation, **kwargs), handle.last.recall.recalled
        for row, images in enumerate((slice(0, 1), slice(1, 2), slice(2, 4))):
            real = inputs["attention_mask"][row].bool()
            alone = {"input_ids": inputs["input_ids"][row : row + 1, real]}
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            alone["pixel_values"] = inputs["pixel_values"][images]
            cache = model.generate(**alone, **GREEDY, max_new_tokens=ANSWER).past_key_values
            later = {name: value[row : row + 1, (~real).sum() :] for name, value in conversation.items()}
            single = model.generate(**later, past_key_values=cache, **GREEDY, max_new_tokens=ANSWER)
            assert handle.last.recall.recalled == [recalled[row]]
            assert_close(torch.stack(single.logits, 1)[0], torch.stack(found.logits, 1)[row])


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_what_recall_cannot_serve_is_refused(family, plain, model):
    inputs = make_batch(family, "single")
    for settings, told in (
        ({"recall": 1.5}, "recall must be True, False, 'device', 'host' or Recall"),
        ({"method": "random"}, "scores tokens against a question before layer 0, got 'random'"),
        ({"method": "cdpruner"}, "got 'cdpruner'"),
        ({"method": ByTower()}, "asks for more .needs_tower"),
        ({"positions": "compact"}, "positions must be 'keep', got 'compact'"),
        ({"text": torch.ones(1, 4, dtype=torch.bool)}, "got a mask of one prompt"),
    ):
        with pytest.raises(ValueError, match=told):
            uniform(0.25, **{"recall": True, **settings})
    with pytest.raises(ValueError, match="vision_kv must be 'recompute' or 'keep', got 'drop'"):
        Recall(vision_kv="drop")
    with pytest.raises(ValueError, match="'leave' needs vision_kv='recompute'"):
        Recall(vision_kv="keep", unwanted="leave")
    vision = uniform(0.25, recall=True)
    for beside in ({"text": asymvlm.TextEviction(8, 0.5)}, {"turns": asymvlm.TurnEviction()}):
        with pytest.raises(NotImplementedError, match="eviction has tables of them"):
            asymvlm.patch(model, vision=vision, **beside)
    with pytest.raises(NotImplementedError, match="prune_inputs keeps nothing"):
        asymvlm.prune_inputs(model, vision, **inputs)
    with asymvlm.patch(model, vision=vision):
        with pytest.raises(NotImplementedError, match=r"a cache that grows .*, got 'static'"):
            model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
        cache = StaticCache(model.config, max_cache_len=64)
        with pytest.raises(NotImplementedError, match="got one with StaticLayer"):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(NotImplementedError, match="'sdpa' or 'eager', got 'flex_attention'"):
        asymvlm.patch(model, vision=vision)


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_a_cache_is_as_it_was_where_the_decoder_fails(family, plain, model, monkeypatch):
    with asymvlm.patch(model, vision=uniform(0.25, recall=LEAVE)) as handle:
        talk = Talk(family, plain, handle, make_batch(family, "left_padded"))
        conversation = longer(family, talk.inputs, talk.result.sequences)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.language_model.norm, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                talk.generate(without_images(conversation), past_key_values=talk.result.past_key_values)
        assert sum(talk.ask(LEAVE)) > 0


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_spread_scores_and_budgets_of_scores(family, plain, model):
    """What comes back is what a first call would keep for that question."""
    settings = dict(budget=RelativeThresholdBudget(0.5), spread=Spread(2, 0.5))
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=VisionPruning(**settings, recall=True)) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        before = handle.last.index.tolist()
        conversation = longer(family, inputs, result.sequences)
        known = result.sequences.shape[1] - 1
        model.generate(
            **without_images(conversation), past_key_values=result.past_key_values, **GREEDY, max_new_tokens=ANSWER
        )
        after, recalled = handle.last.index.tolist(), handle.last.recall.recalled
    new = torch.arange(conversation["input_ids"].shape[1]) >= known
    vision = VisionPruning(**settings, text=new.expand_as(conversation["input_ids"]))
    with torch.no_grad(), asymvlm.patch(model, vision=vision) as handle:
        model(**conversation)
        wanted = handle.last.index.tolist()
    for row, (first, chosen, found) in enumerate(zip(before, wanted, after, strict=True)):
        behind = {*range(inputs["input_ids"].shape[1], len(new))}
        assert {*found} - {-1} == ({*first} | {*chosen} | behind) - {-1}
        assert recalled[row] == len({*chosen} - {*first} - behind)
    assert sum(recalled) > 0


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_cache_are_repeated_with_what_may_come_back(family, plain, model, dtype):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model.to(dtype), vision=uniform(0.25, recall="host")) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        conversation = without_images(longer(family, inputs, result.sequences))
        twice = {name: value.repeat_interleave(2, 0) for name, value in conversation.items()}
        cache = copy.deepcopy(result.past_key_values)
        cache.batch_repeat_interleave(2)
        options = dict(**GREEDY, max_new_tokens=ANSWER)
        once = model.generate(**conversation, past_key_values=result.past_key_values, **options)
        recalled = handle.last.recall.recalled
        found = model.generate(**twice, past_key_values=cache, **options)
        assert handle.last.recall.recalled == [count for count in recalled for _ in range(2)]
    assert sum(recalled) > 0
    expected = torch.stack(once.logits, 1).repeat_interleave(2, 0)
    assert_close(torch.stack(found.logits, 1), expected, None if dtype == torch.float32 else 0.02)
