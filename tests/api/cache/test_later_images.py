"""Images of a later turn, put behind a pruned cache, are pruned and answered as in the masked conversation."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, set_tolerance, uniform
from masked_reference import Selection, masked_forward, masked_greedy, select
from tiny import BATCHES, BEGIN_IMAGE, END_IMAGE, FAMILIES, PAD, REPRESENTATIVE, Images, make_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import asymvlm

ANSWER = 3
# the second turn of each row: text, images, text; rows of different lengths are padded on the left, between the turns.
# The longest row has no image, so that pruning leaves holes in the others.
TURNS = {
    "single": [((72, 73), 1, (74, 75))],
    "left_padded": [((72,), 1, (74, 75)), (tuple(range(20, 64)), 0, (78,)), ((79,), 2, (80, 81, 82))],
}
REFUSING = {
    "paligemma": "attends both ways",
    "qwen3_5": "recurrent",
    "qwen3_5_moe": "recurrent",
    "lfm2_vl": "recurrent",
}
# every family in the hardest case, those that stand for the others in all
CASES = [
    (name, batch, brought)
    for name in FAMILIES
    for batch, brought in (("single", "new"), ("left_padded", "all"), ("left_padded", "new"))
    if name not in REFUSING and (name in REPRESENTATIVE or (batch, brought) == ("left_padded", "new"))
]


@dataclass(frozen=True)
class Listed(Images):
    """Images named one by one, as (seed, number)."""

    names: tuple[tuple[int, int], ...] = ()

    def draw(self, *shape: int) -> Tensor:
        return torch.cat([Images(1, seed, number).draw(*shape) for seed, number in self.names])


@dataclass(frozen=True)
class Conversation:
    """Two turns as a processor returns them: with all images, row by row, and with the second turn's alone."""

    whole: dict[str, Tensor]
    new_images: dict[str, Tensor]
    known: int  # columns of the first turn and its answer


def two_turns(family: str, batch: str, answer: Tensor, seed: int = 3) -> Conversation:
    rows, side = BATCHES[batch]
    processor, image = FAMILIES[family].processor, FAMILIES[family].image
    first = make_inputs(family, rows, side)
    turns = [[*before, *[BEGIN_IMAGE, *image, END_IMAGE] * images, *after] for before, images, after in TURNS[batch]]
    length = max(map(len, turns))
    new = torch.tensor([[PAD] * (length - len(turn)) + turn for turn in turns])
    mask = torch.tensor([[0] * (length - len(turn)) + [1] * len(turn) for turn in turns])
    ids = torch.cat([first["input_ids"], answer, new], 1)
    text = {"attention_mask": torch.cat([first["attention_mask"], torch.ones_like(answer), mask], 1)}
    old, later = [row.images for row in rows], [images for _, images, _ in TURNS[batch]]
    names: list[tuple[int, int]] = []
    for row in range(len(rows)):
        names += [(0, sum(old[:row]) + number) for number in range(old[row])]
        names += [(seed, sum(later[:row]) + number) for number in range(later[row])]
    inputs = processor(ids, Listed(len(names), names=tuple(names)))
    per_token = {name: value for name, value in inputs.items() if value.shape == ids.shape}
    alone = processor(new, Images(sum(later), seed))
    alone = {name: value for name, value in alone.items() if name not in per_token}
    text |= {"input_ids": ids, **per_token}
    return Conversation({**inputs, **text}, {**alone, **text}, ids.shape[1] - length)


def reference(model: PreTrainedModel, talk: Conversation, keep: Tensor, ratio: float = 0.5) -> tuple[Tensor, Selection]:
    """What is kept (B, S) of the conversation whose first turn keeps ``keep``, and the selection among the rest."""
    # the last answer token is not in the cache yet: it belongs to the second turn
    selection = select(model, talk.whole, ratio, first=talk.known - 1)
    kept = selection.keep.clone()
    kept[:, : keep.shape[1]] = keep
    return kept, selection


@pytest.mark.parametrize("family, batch, brought", CASES, indirect=["family"])
def test_generate(family, plain, model, batch, brought):
    inputs = tiny.make_batch(family, batch)
    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, batch, result.sequences[:, -ANSWER:])
        kept, selection = reference(plain, talk, keep)
        sent = talk.whole if brought == "all" else talk.new_images
        result = model.generate(**sent, past_key_values=result.past_key_values, **GREEDY, max_new_tokens=4)
    ids, logits = masked_greedy(plain, talk.whole, kept, steps=4)
    assert torch.equal(result.sequences, torch.cat([talk.whole["input_ids"], ids], 1))
    assert_close(torch.stack(result.logits, 1), logits)
    report, real = handle.last, talk.whole["attention_mask"].bool()
    assert report.kept == selection.kept
    assert report.vision_tokens == selection.vision
    assert report.tokens_before == real.sum(-1).tolist()
    assert report.tokens_after == (kept & real).sum(-1).tolist()
    assert [[i for i in row if i >= 0] for row in report.index.tolist()] == [
        row.nonzero()[:, 0].tolist() for row in kept & real
    ]
    assert result.past_key_values.get_seq_length() == report.index.shape[1] + 3


@pytest.mark.parametrize("family, window", [("gemma3", 12), ("gemma3", 60), ("mistral3", 30)], ids=str)
def test_windows_reach_as_far_as_in_the_unpruned_conversation(family, window):
    set_tolerance(FAMILIES[family].atol)
    model = tiny.build(family, sliding_window=window)
    inputs = tiny.make_batch(family, "left_padded")
    keep = select(model, inputs, 0.5).keep
    with asymvlm.patch(copy.deepcopy(model), vision=uniform(0.5)) as handle:
        result = handle.model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "left_padded", result.sequences[:, -ANSWER:])
        cache = result.past_key_values
        result = handle.model.generate(**talk.new_images, past_key_values=cache, **GREEDY, max_new_tokens=4)
    kept, _ = reference(model, talk, keep)
    _, logits = masked_greedy(model, talk.whole, kept, steps=4)
    assert_close(torch.stack(result.logits, 1), logits)


def test_compact_positions_go_on_from_the_shorter_end(family, plain, model):
    if family in REFUSING:
        pytest.skip("takes no images in a later turn")
    inputs = tiny.make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(model, vision=uniform(0.5, positions="compact")):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "left_padded", result.sequences[:, -ANSWER:])
        cache = result.past_key_values
        result = model.generate(**talk.whole, past_key_values=cache, **GREEDY, max_new_tokens=4)
    kept, _ = reference(plain, talk, keep)
    positions = ((kept & talk.whole["attention_mask"].bool()).cumsum(-1) - 1).clamp(min=0)
    positions = positions.expand(3, -1, -1) if FAMILIES[family].mrope else positions
    _, logits = masked_greedy(plain, talk.whole, kept, steps=4, position_ids=positions)
    assert_close(torch.stack(result.logits, 1), logits)


def test_a_third_turn_goes_on_with_text_and_a_fourth_with_images(family, plain, model):
    if family in REFUSING:
        pytest.skip("takes no images in a later turn")
    inputs = tiny.make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "left_padded", result.sequences[:, -ANSWER:])
        kept, _ = reference(plain, talk, keep)
        result = model.generate(**talk.new_images, past_key_values=result.past_key_values, **GREEDY, max_new_tokens=2)
        for images in (0, 1):
            rows = len(keep)
            new = torch.tensor([[90, *[BEGIN_IMAGE, *FAMILIES[family].image, END_IMAGE] * images, 91]] * rows)
            ids = torch.cat([result.sequences, new], 1)
            added = ids.shape[1] - kept.shape[1]
            names = {"attention_mask": 1, **dict.fromkeys(("token_type_ids", "mm_token_type_ids"), 0)}
            whole = {
                name: nn.functional.pad(value, (0, added), value=names[name]) if name in names else value
                for name, value in talk.whole.items()
            } | {"input_ids": ids}
            sent = {name: value for name, value in whole.items() if value.shape == ids.shape}
            first = ids.shape[1] - new.shape[1] - 1
            if images:
                extra = FAMILIES[family].processor(new, Images(rows, seed=8))
                types = {name: value for name, value in extra.items() if value.shape == new.shape}
                for name, value in types.items():
                    sent[name] = torch.cat([whole[name][:, : -new.shape[1]], value], 1)
                sent |= {name: value for name, value in extra.items() if name not in types}
                # the reference sees row by row: first, second and fourth turn
                order = [(0, 0), (3, 0), (8, 0), (0, 1), (8, 1), (0, 2), (0, 3), (3, 1), (3, 2), (8, 2)]
                inputs = FAMILIES[family].processor(ids, Listed(len(order), names=tuple(order)))
                whole = {**whole, **inputs, **{name: value for name, value in sent.items() if name in types}}
            result = model.generate(**sent, past_key_values=result.past_key_values, **GREEDY, max_new_tokens=2)
            selection = select(plain, whole, 0.5, first=first)
            kept = torch.cat([kept, selection.keep[:, kept.shape[1] :]], 1)
            ids, logits = masked_greedy(plain, whole, kept, steps=2)
            assert torch.equal(result.sequences[:, -2:], ids)
            assert_close(torch.stack(result.logits, 1), logits)
            talk = Conversation(whole, sent, first)


def test_a_loop_by_hand(family, plain, model):
    """`model(**new_tokens_and_images, past_key_values=cache)`; the logits behind each kept new token."""
    if family in REFUSING:
        pytest.skip("takes no images in a later turn")
    inputs = tiny.make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        out = model(**inputs, use_cache=True)
        token, answer = out.logits[:, -1:].argmax(-1), []
        mask = inputs["attention_mask"]
        for _ in range(ANSWER - 1):
            answer.append(token)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
            token = out.logits[:, -1:].argmax(-1)
        talk = two_turns(family, "left_padded", torch.cat([*answer, token], 1))
        new = {
            name: value[:, talk.known - 1 :]
            for name, value in talk.whole.items()
            if value.shape == (3, len(talk.whole["input_ids"][0]))
        }
        new = {**talk.new_images, **new, "attention_mask": talk.whole["attention_mask"]}
        out = model(**new, past_key_values=out.past_key_values)
        kept, selection = reference(plain, talk, keep)
        index = handle.last.index[:, -out.logits.shape[1] :]
        rows, slots = (index >= 0).nonzero(as_tuple=True)
        expected = masked_forward(plain, talk.whole, kept)
        assert_close(out.logits[rows, slots], expected[rows, index[rows, slots]])
        assert handle.last.kept == selection.kept
        token = out.logits[:, -1:].argmax(-1)
        mask = nn.functional.pad(talk.whole["attention_mask"], (0, 1), value=1)
        out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
    names = {"attention_mask": 1, **dict.fromkeys(("token_type_ids", "mm_token_type_ids"), 0)}
    whole = {n: nn.functional.pad(v, (0, 1), value=names[n]) if n in names else v for n, v in talk.whole.items()}
    whole["input_ids"] = torch.cat([whole["input_ids"], token], 1)
    expected = masked_forward(plain, whole, nn.functional.pad(kept, (0, 1), value=True))
    assert_close(out.logits[:, -1], expected[:, -1])


@pytest.mark.parametrize("family", REFUSING, indirect=True)
def test_families_whose_cached_prompt_would_change_refuse(family, model):
    inputs = tiny.make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "single", result.sequences[:, -ANSWER:])
        cache, length = result.past_key_values, result.past_key_values.get_seq_length()
        with pytest.raises(NotImplementedError, match=f"new images on a filled cache.*{REFUSING[family]}"):
            model.generate(**talk.whole, past_key_values=cache, max_new_tokens=2)
        new = {name: value[:, talk.known - 1 :] for name, value in talk.whole.items() if value.ndim == 2}
        with torch.no_grad(), pytest.raises(NotImplementedError, match="pass the whole conversation"):
            model(**{**talk.new_images, **new}, past_key_values=cache)
        assert cache.get_seq_length() == length
        assert model.generate(**talk.whole, max_new_tokens=2).shape[1] == talk.whole["input_ids"].shape[1] + 2


def test_what_does_not_fit_is_refused_in_words(family, model):
    if family in REFUSING:
        pytest.skip("takes no images in a later turn")
    inputs = tiny.make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "single", result.sequences[:, -ANSWER:])
        call = dict(past_key_values=result.past_key_values, max_new_tokens=2)
        other = {**talk.whole, "input_ids": talk.whole["input_ids"].clone()}
        other["input_ids"][0, 1] += 1
        with pytest.raises(ValueError, match="must go on from the prompt of the pruned cache"):
            model.generate(**other, **call)
        none = {name: value for name, value in talk.whole.items() if value.shape == other["input_ids"].shape}
        with pytest.raises(ValueError, match="have new images, but none of pixel_values"):
            model.generate(**none, **call)
        found = model.generate(**talk.new_images, **call)
    assert torch.equal(found[:, :-2], talk.whole["input_ids"])


def test_a_patch_turned_off_keeps_all_of_the_new_images(family, plain, model):
    if family in REFUSING:
        pytest.skip("takes no images in a later turn")
    inputs = tiny.make_batch(family, "single")
    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        talk = two_turns(family, "single", result.sequences[:, -ANSWER:])
        handle.enabled = False
        result = model.generate(**talk.whole, past_key_values=result.past_key_values, **GREEDY, max_new_tokens=2)
    kept, _ = reference(plain, talk, keep, ratio=1.0)
    _, logits = masked_greedy(plain, talk.whole, kept, steps=2)
    assert_close(torch.stack(result.logits, 1), logits)
