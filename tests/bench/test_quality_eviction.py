"""The quality bench evicts as the library does: transcripts and closed columns, conversations and `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import asymvlm
from asymvlm.hf.arguments import Callee
from asymvlm.methods import LastRow, OldestFirst, RandomEviction
from bench.quality import conversations
from bench.quality.conversations import evict_answers, evict_tokens, last_answer, make_talks
from bench.quality.scorers import load_model, model_inputs
from bench.quality.transcripts import SCORES, Chooser, transcribe
from bench.tinyvlm.evaluate import Samples, make_samples
from bench.tinyvlm.glyphs import BOS, EOS, IMAGE
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION, to_model_pixels
from bench.tinyvlm.pages import make_pages


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CHECKPOINT)


def transcribe_masked(model: Any, samples: Samples, policy: asymvlm.TextEviction, steps: int) -> torch.Tensor:
    """``(B, steps)`` greedy tokens where nothing is removed: a token that would go is closed to all later ones."""
    inputs = model_inputs(samples, range(len(samples)), answers=False)
    mask, generated = inputs["attention_mask"], []
    prompt, cache = mask.shape[1], Callee.of(type(model).forward).cache
    output = model(**inputs, use_cache=True)
    for step in range(steps):
        generated.append(output.logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = model(
            input_ids=generated[-1],
            attention_mask=mask,
            position_ids=torch.full_like(generated[-1], prompt + step),
            **{cache: output.past_key_values},
            output_attentions=True,
        )
        layers = output.attentions if policy.layers == "all" else output.attentions[-1:]
        scores = torch.stack([layer[:, :, -1].mean(1) for layer in layers]).mean(0)
        may_go = mask.bool()
        may_go[:, :prompt] = may_go[:, -policy.recent :] = False
        count = policy.excess(int(mask[0, prompt:].sum()), step + 1)
        lowest = scores.masked_fill(~may_go, float("inf")).topk(count, largest=False).indices
        mask = mask.scatter(1, lowest, 0)
    return torch.cat(generated, 1)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_transcripts_evict_as_closed_columns_do(model: Any, layers: str) -> None:
    samples = make_samples("validation", 3, seed=3, mix={"read": 1.0}, entries=(5, 5))
    score = "attention" if layers == "last" else "attention of all layers"
    policy = Chooser(score, recent=2).policy(0.5, threshold=12)
    assert policy == asymvlm.TextEviction(threshold=12, retention=0.5, recent=2, layers=layers, method=LastRow())
    ours, evicted = transcribe(model, samples, policy)
    model.set_attn_implementation("eager")  # the one that returns probabilities
    try:
        with torch.inference_mode():
            assert torch.equal(ours, transcribe_masked(model, samples, policy, ours.shape[1]))
    finally:
        model.set_attn_implementation("sdpa")
    assert min(evicted) >= 12
    full, none = transcribe(model, samples, None)
    assert not torch.equal(full, ours), "eviction of half of twelve tokens shows"
    assert not none.any()


def test_transcripts_of_all_methods_give_up_as_many_tokens(model: Any) -> None:
    samples = make_samples("validation", 3, seed=3, mix={"read": 1.0}, entries=(5, 5))
    free = [Chooser(score, protected=False) for score in SCORES]
    evicted = [transcribe(model, samples, one.policy(0.5, threshold=12))[1].tolist() for one in (Chooser(), *free)]
    assert evicted == evicted[:1] * len(evicted)
    assert min(evicted[0]) >= 12
    assert [one.method for one in free] == [LastRow(sinks=0)] * 2 + [OldestFirst(sinks=4), RandomEviction(sinks=0)]
    assert all(Chooser(score).method.sinks is None for score in SCORES)


def test_controls_give_up_as_many_tokens(model: Any) -> None:
    talks = make_talks(model, 12)
    answers = evict_answers(model, talks, 0.5)
    counts = answers.sum(1)
    inside = talks.answer & (talks.turn < conversations.EARLIER) & (talks.text != EOS)
    assert (answers <= inside).all()
    assert (inside.sum(1) - counts <= inside.sum(1) // 2).all()
    assert not (answers & (talks.turn == conversations.EARLIER - 1)).any(), "the last answer stays"
    for how in conversations.CONTROLS:
        dropped = evict_tokens(talks, counts, how)
        assert torch.equal(dropped.sum(1), counts), how
        assert not dropped[:, 0].any()
        assert not (dropped[:, 1 + NUM_VISION :] & (talks.turn == conversations.EARLIER)).any()
        if how.endswith("answer tokens"):
            assert (dropped[:, 1 + NUM_VISION :] <= inside).all()
    sinks = evict_tokens(talks, counts, "oldest of all")
    assert sinks.float().argmax(1).tolist() == [conversations.SINKS] * 12


def test_only_the_last_turn_misses_what_was_dropped(model: Any) -> None:
    talks = make_talks(model, 16)
    nothing = torch.zeros(16, 1 + NUM_VISION + talks.text.shape[1], dtype=torch.bool)
    everything = nothing.clone()
    everything[:, 1 : 1 + NUM_VISION] = True
    assert last_answer(model, talks, nothing).mean() > 0.6
    assert last_answer(model, talks, everything).mean() < 0.5


def test_patched_turns_drop_and_say_what_the_conversations_say(model: Any) -> None:
    count, retention = 4, 0.5
    talks, pages = make_talks(model, count), make_pages([0, 20], count, "test", (6, 12))
    answers = evict_answers(model, talks, retention)
    head = torch.zeros(count, 1 + NUM_VISION, dtype=torch.bool)
    right = last_answer(model, talks, torch.cat([head, answers], 1))
    for row in range(count):
        dialogue = torch.cat([torch.tensor([BOS] + [IMAGE] * NUM_VISION), talks.text[row]])
        turns = torch.nn.functional.pad(talks.turn[row], (1 + NUM_VISION, 0))
        spoken = torch.nn.functional.pad(talks.answer[row], (1 + NUM_VISION, 0))
        words = spoken & (dialogue != EOS) & (turns < conversations.EARLIER)
        policy = asymvlm.TurnEviction(threshold=int(words.sum()) - 1, retention=retention)  # at the last turn alone
        sent: dict[str, Any] = {"pixel_values": to_model_pixels(pages.pixels[row : row + 1])}
        with asymvlm.patch(model, turns=policy) as handle:
            for turn in range(conversations.EARLIER + 1):
                place = (spoken & (turns == turn)).nonzero()[:, 0].tolist()
                ids = dialogue[None, : place[0]]
                forced = [] if turn == conversations.EARLIER else [TrueAnswer(dialogue)]
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **sent,
                    max_new_tokens=len(place),
                    do_sample=False,
                    return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList(forced),
                )
                sent = {"past_key_values": output.past_key_values}
            dropped = set(talks.turn[row][answers[row]].tolist())
            assert set(handle.last.eviction.answers[0]) == dropped
            assert dropped
        assert torch.equal(output.sequences[0], dialogue[: output.sequences.shape[1]]) == bool(right[row])


class TrueAnswer(LogitsProcessor):
    """Lets a model say what stands in the dialogue."""

    def __init__(self, dialogue: torch.Tensor) -> None:
        self.dialogue = dialogue

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, float("-inf"))
        said[:, self.dialogue[input_ids.shape[1]]] = 0
        return said
