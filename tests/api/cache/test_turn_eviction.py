"""Whole answers of earlier turns: the right ones go, and the rest answers as if they were masked."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, uniform
from evicted_reference import Masked
from masked_reference import merged_embeddings, select
from tiny import BEGIN_IMAGE, END_IMAGE, FAMILIES
from windowed import ATOL, windowed

import asymvlm
from asymvlm import TextEviction, TurnEviction
from asymvlm.eviction.turns import TurnEvictor

ANSWER = 6
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def literal(model, reference: Masked, answers: list[range], images: list[list[int]], policy: TurnEviction) -> list:
    """Numbers of the answers that go, by row: the method, read off embeddings of the whole conversation."""
    unit = torch.nn.functional.normalize(merged_embeddings(model, reference.inputs).double(), dim=-1)
    chosen = []
    for b in range(len(unit)):
        held = [[c for c in answer if reference.death[b, c] > reference.columns] for answer in answers]
        scores = [(unit[b, list(answer)] @ unit[b, images[b]].T).amax(1).mean().item() for answer in answers]
        left, target = sum(map(len, held)), math.floor(policy.retention * sum(map(len, held)) + 1e-9)
        gone = []
        if left > policy.threshold:
            for number in sorted(range(len(answers) - 1), key=lambda number: scores[number]):
                if left > target and held[number]:
                    gone.append(number)
                    left -= len(held[number])
        chosen.append(sorted(gone))
    return chosen


@pytest.mark.parametrize("family,vision,text", [
    ("llava", None, None), ("llava", 0.5, None), ("llava", None, TextEviction(30, 0.9)), ("gemma3", None, None),
    ("gemma3", 0.5, None), ("qwen2_5_vl", None, None), ("qwen2_5_vl", 0.5, None), ("phi3_v", None, None),
], ids=str)  # fmt: skip
def test_dialogues_equal_masked_ones(family, vision, text):
    """Six turns of questions about the first images, two rows, each losing answers of its own."""
    model, policy = windowed(family), TurnEviction(threshold=20, retention=0.7)
    inputs = tiny.make_inputs(family, (tiny.ONE, tiny.LONGER))
    keep = None if vision is None else select(model, inputs, vision).keep
    settings = {} if text is None else dict(threshold=text.threshold, retention=text.retention)
    reference = Masked(model, inputs, keep, **settings, sliding="keep")
    embeds_of = Masked(model, inputs).model
    columns = [tiny.vision_columns(model, inputs["input_ids"])[b][0] for b in range(2)]
    if family == "phi3_v":  # its separators are image tokens too
        columns = [(row == tiny.IMAGE).nonzero()[:, 0].tolist() for row in inputs["input_ids"]]
    if keep is not None:
        columns = [[c for c in columns[b] if keep[b, c]] for b in range(2)]
    sent, cache, answers, seen = dict(inputs), {}, [], []
    pruning = {} if vision is None else {"vision": uniform(vision)}
    with asymvlm.patch(copy.deepcopy(model), text=text, turns=policy, **pruning) as handle:
        for turn in range(6):
            ids, logits = reference.generate(ANSWER)
            found = handle.model.generate(**sent, **cache, **GREEDY, max_new_tokens=ANSWER)
            assert torch.equal(found.sequences[:, -ANSWER:], ids)
            assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
            if turn:
                assert handle.last.eviction.answers == seen[-1]
            answers.append(range(reference.columns - ANSWER, reference.columns))
            last = reference.columns - 2  # the last token that the decoder was fed
            question = torch.randint(20, 60, (2, 4), generator=torch.Generator().manual_seed(turn + 7))
            reference.append(question)
            gone = literal(embeds_of, reference, answers, columns, policy)
            seen.append(gone)
            for b in range(2):
                dead = [c for n in gone[b] for c in answers[n] if reference.death[b, c] > reference.columns]
                reference.death[b, dead] = last
            sent = {
                name: reference.inputs[name] for name in ("input_ids", "attention_mask", *PER_TOKEN) if name in inputs
            }
            cache = {"past_key_values": found.past_key_values}
    assert any(map(any, seen)), "no answer ever went"
    if (family, vision, text) == ("llava", None, None):
        assert any(first != second for first, second in seen), "rows must lose different answers, or nothing is shown"


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("vision", [None, 0.5], ids=["whole", "pruned"])
def test_a_turn_with_its_own_image_is_scored_against_it(family, vision):
    if family == "qwen2_5_vl" and vision is None:
        pytest.skip("the unpatched model wants the grids of all images and the pixels of the new ones")
    policy, model = TurnEviction(threshold=10, retention=0.5), copy.deepcopy(windowed(family))
    inputs = tiny.make_inputs(family, (tiny.ONE,))
    scored = []
    pruning = {} if vision is None else {"vision": uniform(vision)}
    with asymvlm.patch(model, turns=policy, **pruning) as handle:
        choose = TurnEvictor.choose
        handle._evictor.turns.choose = lambda held, scores: (
            scored.append(scores), choose(handle._evictor.turns, held, scores))[1]  # fmt: skip
        sent, cache, ids = dict(inputs), {}, inputs["input_ids"]
        for turn in range(3):
            found = handle.model.generate(
                **sent, **cache, do_sample=False, return_dict_in_generate=True, max_new_tokens=8
            )
            image = list(FAMILIES[family].image) if turn == 1 else []
            new = [21 + turn, *([BEGIN_IMAGE, *image, END_IMAGE] if image else []), 30, 31]
            ids = torch.cat([found.sequences, torch.tensor([new])], 1)
            later = tiny.make_inputs(family, (tiny.ONE,), first_image=5) if image else {}
            sent = {**later, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for name, value in (("token_type_ids", ids == tiny.IMAGE), ("mm_token_type_ids", ids == tiny.IMAGE)):
                if name in inputs:
                    sent[name] = value.long()
            cache = {"past_key_values": found.past_key_values}
    dialogue = found.past_key_values.dialogue
    assert len(dialogue.images) == 2
    assert len(dialogue.answers) == 3
    answers = [model.get_input_embeddings()(answer.ids)[0] for answer in dialogue.answers[:2]]
    own = dialogue.images[1][0][0]
    kept = 16 if vision is None else 8
    assert own.shape[0] == kept
    cosine = [torch.cosine_similarity(answer[:, None], own[None], dim=-1).amax(1).mean().item() for answer in answers]
    assert scored[1] == pytest.approx(cosine, abs=1e-5)


def test_the_order_of_answers():
    evictor = TurnEvictor(None, TurnEviction(threshold=10, retention=0.5))
    assert evictor.choose([4, 4, 2], [0.1, 0.2, 0.0]) == [], "10 are not more than 10"
    assert evictor.choose([4, 4, 4], [0.3, 0.2, 0.0]) == [1, 0], "the last never goes"
    assert evictor.choose([4, 4, 4], [0.2, 0.2, 0.9]) == [0, 1], "among equal ones the oldest"
    assert evictor.choose([6, 4, 2], [0.2, float("nan"), 0.9]) == [1, 0], "NaN is no reason to stay"
    assert evictor.choose([6, 0, 6], [0.2, 0.1, 0.9]) == [0], "what is gone cannot go"
    assert evictor.choose([2, 2, 20], [0.2, 0.1, 0.0]) == [1, 0], "as far as it can"
    assert TurnEvictor(None, TurnEviction(threshold=0, retention=1.0)).choose([3, 3], [0.0, 0.0]) == []


def test_ends_and_padding_of_an_answer_stay():
    """Row 1 stops early: its answer is two words, the end of the turn is template."""
    policy, model = TurnEviction(threshold=1, retention=0.1), copy.deepcopy(windowed("llava"))
    inputs = tiny.make_inputs("llava", (tiny.ONE, tiny.LONGER))
    plan = torch.tensor([[30, 31, 32, 33], [34, 35, tiny.EOS, tiny.PAD]])

    def forced(ids, scores):
        step = ids.shape[1] - forced.start
        return torch.full_like(scores, -1e9).scatter_(1, plan[:, step : step + 1], 0.0)

    with asymvlm.patch(model, turns=policy) as handle:
        sent, cache = dict(inputs), {}
        for _ in range(3):
            forced.start = sent["input_ids"].shape[1]
            found = handle.model.generate(
                **sent, **cache, do_sample=False, max_new_tokens=4, logits_processor=[forced],
                return_dict_in_generate=True,
            )  # fmt: skip
            assert torch.equal(found.sequences[:, -4:], plan)
            ids = torch.cat([found.sequences, torch.tensor([[21], [22]])], 1)
            sent = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}
            cache = {"past_key_values": found.past_key_values}
    cache = found.past_key_values
    assert [answer.words.sum(1).tolist() for answer in cache.dialogue.answers] == [[4, 2]] * 3
    assert handle.last.eviction.answers == [[0], [0]]
    assert handle.last.eviction.evicted == [4, 2]
    assert cache.stats().evicted == [4, 2]
    first = cache.dialogue.answers[0]
    held = [{*row[row >= 0].tolist()} for row in cache.table.slot_pos]
    assert not held[0] & {*range(first.start, first.stop)}
    assert held[1] & {*range(first.start, first.stop)} == {first.start + 2}, "its end stays"


def test_beams_and_embeddings_are_refused():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")
    with asymvlm.patch(model, turns=TurnEviction()):
        with pytest.raises(NotImplementedError, match="beams"):
            model.generate(**inputs, num_beams=2, max_new_tokens=2)
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(inputs_embeds=torch.randn(1, 5, 32), max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
