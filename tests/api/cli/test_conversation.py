"""`Conversation` feeds each thing once and answers as the whole conversation would be answered."""

from __future__ import annotations

import pytest
import torch
from checkpoint import checkpoint, page
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm
from asymvlm import Conversation, EvictionCache, TextEviction, TurnEviction, UniformBudget, VisionPruning

__all__ = ["checkpoint", "page"]  # fixtures

QUESTIONS = ("What is due?", "Is it?", "What?", "due?")


@pytest.fixture
def loaded(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)


def literal(model, processor, images: dict[int, Image.Image]) -> list[list[int]]:
    """Each answer from the whole conversation, fed anew without a cache; template and ids put together by hand."""
    ids, pixels, answers, eos = [], [], [], model.config.get_text_config().eos_token_id
    for turn, question in enumerate(QUESTIONS):
        image = "<image>\n" if turn in images else ""
        text = f"{'' if turn else '<s>'}USER: {image}{question}ASSISTANT:"
        given = {"images": [images[turn]]} if turn in images else {}
        new = processor(text=text, add_special_tokens=False, return_tensors="pt", **given)
        ids += new["input_ids"][0].tolist()
        pixels += [new["pixel_values"]] if given else []
        answer = []
        for _ in range(8):
            with torch.no_grad():
                whole = torch.tensor([ids + answer])
                logits = model(input_ids=whole, pixel_values=torch.cat(pixels), use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
            if answer[-1] == eos:
                break
        answers.append(answer)
        ids += [token for token in answer if token != eos]
    return answers


@pytest.mark.parametrize("patched", ["no patch", "nothing to evict", "keep all"])
def test_turns_equal_the_whole_conversation(loaded, page, patched):
    model, processor = loaded
    images = {0: Image.open(page).convert("RGB"), 2: Image.new("RGB", (50, 40), (200, 30, 90))}
    expected = literal(model, processor, images)
    settings = {"nothing to evict": {"text": TextEviction(64, 0.5), "turns": TurnEviction(64, 0.5)},
                "keep all": {"vision": VisionPruning(budget=UniformBudget(1.0))}}  # fmt: skip
    if patched in settings:
        asymvlm.patch(model, **settings[patched])
    talk, fed = Conversation(model, processor, max_new_tokens=8, do_sample=False), []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for turn, question in enumerate(QUESTIONS):
        fed.clear()
        reply = talk.ask(question, [images[turn]] if turn in images else [])
        tokens = expected[turn]
        assert reply.new_tokens == len(tokens)
        assert reply.text == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert fed[0] < 60, "a turn feeds what is new"
        assert talk.messages[-1]["content"][0]["text"] == reply.text
    assert isinstance(talk.cache, EvictionCache) == (patched == "nothing to evict")
    if patched == "nothing to evict":
        assert len(talk.cache.dialogue.answers) == 4
        assert len(talk.cache.dialogue.images) == 2


def test_answers_leave_and_questions_stay(loaded, page):
    model, processor = loaded
    handle = asymvlm.patch(model, vision=VisionPruning(), text=TextEviction(24, 0.5), turns=TurnEviction(16, 0.5))
    talk = Conversation(model, processor, max_new_tokens=12, do_sample=False, eos_token_id=None)
    held = []
    for turn, question in enumerate(QUESTIONS * 2):
        reply = talk.ask(question, [Image.open(page).convert("RGB")] if turn % 3 == 0 else [])
        assert reply.report is handle.last
        held.append(talk.cache.stats().held[0])
    assert handle.last.eviction.answers[0], "the last turn evicted an answer"
    assert max(held) <= 24
    table, dialogue = talk.cache.table, talk.cache.dialogue
    columns = {*table.slot_pos[0][table.slot_pos[0] >= 0].tolist()}
    answered = {column for answer in dialogue.answers for column in range(answer.start, answer.stop)}
    assert {*range(talk.cache.get_seq_length())} - answered <= columns, "images, questions and template stay"
    last = dialogue.answers[-1]
    assert {*range(last.start, last.stop - 1)} & columns


def test_a_dialogue_stays_within_its_limit(loaded, page):
    model, processor = loaded
    with asymvlm.patch(model, cache=asymvlm.CacheLimit("h2o", tokens=30)):
        talk = Conversation(model, processor, max_new_tokens=4, do_sample=False)
        for image in ([Image.open(page).convert("RGB")], [], [Image.new("RGB", (50, 40), (200, 30, 90))]):
            talk.ask(QUESTIONS[0], image)
            stats = talk.cache.stats()
            assert stats.tokens == [30]
    assert stats.logical > 60


def test_dropped_tokens_come_back_for_another_question(loaded, page):
    model, processor = loaded
    vision = VisionPruning(budget=UniformBudget(0.25), text="user", processor=processor, recall=True)
    with asymvlm.patch(model, vision=vision):
        talk = Conversation(model, processor, max_new_tokens=4, do_sample=False)
        kept, came = talk.ask(QUESTIONS[0], [Image.open(page).convert("RGB")]).report.kept[0], 0
        for question in (QUESTIONS[0], "alpha beta gamma"):
            report = talk.ask(question).report
            came += report.recall.recalled[0]
            assert report.kept == [kept + came]
    assert report.to_dict()["recall"]["recalled"] == report.recall.recalled
    assert report.recall.recalled[0] > 0
    assert report.recall.seconds > 0


def test_what_cannot_work_is_refused(loaded, page):
    model, processor = loaded
    talk = Conversation(model, processor, max_new_tokens=2)
    with pytest.raises(ValueError, match="placeholder of an image"):
        talk.ask("What is <image>?")
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        Conversation(model, processor)


def test_a_template_that_hides_the_answer_is_refused(loaded):
    model, processor = loaded
    processor.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}USER: {{ m['content'][0]['text'] }}{% endfor %}"
    )
    talk = Conversation(model, processor, max_new_tokens=2)
    talk.ask("What?")
    with pytest.raises(ValueError, match="hides where"):
        talk.ask("What?")


def test_the_end_of_an_answer_is_said_once(loaded):
    """The model generates the end of its turn, and the template writes it too."""
    model, processor = loaded
    processor.chat_template = (
        "{% if not messages[1:] %}<s>{% endif %}{% for m in messages %}{{ m.role | upper }}: "
        "{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    end = processor.tokenizer.eos_token_id
    words = iter([50, 51, end, 52, 53, 54, 55])  # the first answer ends itself, the second is cut off

    def forced(ids, scores):
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([next(words)]), 0.0)

    talk = Conversation(model, processor, max_new_tokens=4, do_sample=False, logits_processor=[forced])
    with asymvlm.patch(model, turns=TurnEviction(64, 0.5)):
        assert talk.ask("What?").new_tokens == 3
        assert talk.ask("due?").new_tokens == 4
        ids = talk.ids[0].tolist()
        first = processor(text="<s>USER: What?</s>ASSISTANT:", add_special_tokens=False)["input_ids"]
        later = processor(text="</s>USER: due?</s>ASSISTANT:", add_special_tokens=False)["input_ids"]
        first, later = (ids[0] if isinstance(ids[0], list) else ids for ids in (first, later))
        assert ids == [*first, 50, 51, *later, 52, 53, 54, 55]
        assert [answer.words.sum().item() for answer in talk.cache.dialogue.answers] == [2, 4]
