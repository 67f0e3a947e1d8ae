"""Scoring against the user's words: chat templates of many kinds tell them, and one that does not is refused."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from checkpoint import QUESTION, checkpoint, own_checkpoint, page
from checks import GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_greedy, select
from PIL import Image
from tiny import BATCHES, BOS, REPRESENTATIVE, make_batch, make_inputs
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import asymvlm
from asymvlm import UserTurns, VisionPruning
from asymvlm_cli import main

__all__ = ["checkpoint", "own_checkpoint", "page"]  # fixtures

PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)
# as the families write them: how a turn opens and closes, where the image goes, what a system message becomes
TEMPLATES = {
    "qwen": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
        + PARTS
        + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]" + PARTS + "[/INST]"
        "{% else %}" + PARTS + "</s>{% endif %}{% endfor %}"
    ),
    "idefics": (
        "<s>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}" + PARTS + "<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "llava": (
        "{% for m in messages %}{{ m['role'] | upper }}: " + PARTS.replace("IMAGE", "IMAGE\n") + " {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
BARE = "{% for m in messages %}" + PARTS + "{% endfor %}"
SPECIAL = ["<pad>", "<s>", "</s>", "IMAGE", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["[INST]", "[/INST]", "<end_of_utterance>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


@functools.cache
def tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A small vocabulary that spells spaces as byte-level or as SentencePiece ones do; words merge with them."""
    made = Tokenizer(tokenizer_models.BPE())
    alphabet = [chr(code) for code in range(33, 127)]
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet += ["Ġ", "Ċ"]
    else:
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet += ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    words = ["user: what is it?\n", "USER: ASSISTANT: why?\n\n", "assistant model system You are helpful."]
    made.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=template,
    )


def say(tokenizer, *turns: tuple[str, str], image: bool) -> list[int]:
    """Ids of a dialogue; an image before the first text becomes three placeholders."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    if "m['content'] }}" in tokenizer.chat_template:
        messages = [
            {"role": role, "content": "IMAGE\n" * (image and not i) + text} for i, (role, text) in enumerate(turns)
        ]
    elif image:
        messages[0]["content"].insert(0, {"type": "image"})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text.replace("IMAGE", "IMAGE" * 3), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_users_words_and_nothing_else(kind, name):
    tok = tokenizer(kind, TEMPLATES[name])
    turns = UserTurns.of(tok)
    dialogue = [("user", "what is it?"), ("assistant", "it is user input"), ("user", "why, then"), ("assistant", "so")]
    for length, image in ((1, False), (1, True), (3, True), (4, True)):
        ids = torch.tensor([say(tok, *dialogue[:length], image=image)])
        words, has_turn = turns.find(ids)
        said = "".join(text for role, text in dialogue[:length] if role == "user")
        assert "".join(tok.decode(ids[words]).split()) == "".join(said.split())
        assert has_turn.tolist() == [True]
        # padding, other rows and a cut in the middle of a marker change nothing
        padded = torch.nn.functional.pad(ids, (5, 0), value=tok.pad_token_id)
        other = torch.full_like(padded, ids[0, -1])
        words_of_two, has_turn = turns.find(torch.cat([padded, other]))
        assert torch.equal(words_of_two[:1, 5:], words)
        assert has_turn.tolist() == [True, False]


def test_a_template_that_hides_the_turns_is_refused():
    with pytest.raises(ValueError, match="cannot tell the user's turns by the chat template of TokenizersBackend"):
        UserTurns.of(tokenizer("bytes", BARE))
    without = tokenizer("words", TEMPLATES["qwen"])
    template, without.chat_template = without.chat_template, None
    try:
        with pytest.raises(ValueError, match="has none: pass a"):
            VisionPruning(text="user", processor=without)
    finally:
        without.chat_template = template
    with pytest.raises(ValueError, match=r"needs processor=\.\.\.,.*got None"):
        VisionPruning(text="user")
    with pytest.raises(ValueError, match=r"got \(\) and \(3,\)"):
        UserTurns((), (3,))


# ids of the tiny prompts (`tiny.BATCHES`): begin-of-text opens a turn, 7, 14 or 25 stand before an image
TURNS = UserTurns(begin=(BOS,), end=(10, 11), template=frozenset({6, 13, 27, *range(100, 120)}))


def words_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] < 100) & (inputs["input_ids"] != BOS)
    return text & ~torch.isin(inputs["input_ids"], torch.tensor([6, 10, 11, 13, 27]))


@pytest.mark.every_family
def test_pruning_by_the_users_words(family, plain, model):
    inputs = make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5, text_mask=words_of(inputs))
    if family in REPRESENTATIVE:
        assert not torch.equal(selection.index, select(plain, inputs, 0.5).index), "the words must matter"
    ids, logits = masked_greedy(plain, inputs, selection.keep, steps=3)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, text=TURNS)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        assert torch.equal(handle.last.index, selection.index)
        forward = model(**inputs).logits
    assert torch.equal(found.sequences[:, -3:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert_kept_logits(forward, masked_forward(plain, inputs, selection.keep), selection)


def test_images_outside_any_turn_are_refused_and_a_turn_of_template_only_keeps_all(family, model):
    inputs = make_batch(family, "left_padded")
    elsewhere = uniform(0.5, text=dataclasses.replace(TURNS, begin=(5, 6)))
    refusal = pytest.raises(ValueError, match=r"ids \[5, 6\] that open a user's turn, rows \[1, 2\]")
    with asymvlm.patch(model, vision=elsewhere), refusal:
        model.generate(**inputs, max_new_tokens=2)
    silent = dataclasses.replace(TURNS, template=frozenset(range(120)))
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, text=silent)) as handle:
        model(**inputs)
    assert handle.last.kept == handle.last.vision_tokens
    assert handle.last.notes[0] == "row 0: no text to score against, every vision token kept"


def test_a_text_only_row_needs_no_turn(family, model):
    rows, side = BATCHES["image_free_row"]
    inputs = make_inputs(family, rows, side)
    row = inputs["input_ids"][1]
    row[row == BOS] = 12
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, text=TURNS)) as handle:
        model(**inputs)
    assert handle.last.kept == [8, 0, 16]


def test_the_command_line(checkpoint: Path, page: Path, own_checkpoint: Path, capsys) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    content = [{"type": "image", "image": Image.open(page)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"]
    turns = UserTurns.of(processor)
    words, _ = turns.find(ids)
    assert "".join(processor.tokenizer.decode(ids[words]).split()) == "".join(QUESTION.split())
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.25, text="user", processor=processor)) as handle:
        model(**inputs)
    command = [
        "--image",
        str(page),
        "--question",
        QUESTION,
        "--keep",
        "0.25",
        "--max-new-tokens",
        "1",
        "--text",
        "user",
    ]
    assert main(["run", "--model", str(checkpoint), "--json", *command]) == 0
    assert f'"kept_index": [{handle.last.index[0].tolist()}]' in capsys.readouterr().out
    (own_checkpoint / "chat_template.jinja").unlink()
    assert main(["run", "--model", str(own_checkpoint), *command]) != 0
    assert "text='user' needs a chat template" in " ".join(capsys.readouterr().err.split())
