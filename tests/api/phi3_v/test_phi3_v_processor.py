"""Prompts of Phi-3.5-Vision: ids, placeholders, batches and templates as the public processor makes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from phi3_v_tiny import BOS, CROP, CROPS, PAD, PUBLIC_TEMPLATE, picture, separators, write_processor_files
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from asymvlm.models.phi3_v import Phi3VImageProcessor, Phi3VProcessor

PROMPT = "<|user|>\n<|image_1|>\nwhat is this?<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    (folder / "config.json").write_text('{"model_type": "phi3_v"}')
    write_processor_files(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Phi3VProcessor:
    return AutoProcessor.from_pretrained(folder)


def tokens_of(width: int, height: int) -> int:
    canvas = Phi3VImageProcessor(CROPS, crop_pixels=CROP).canvas(picture(width, height))
    return len(separators(canvas.height // CROP, canvas.width // CROP))


def test_the_hubs_files_give_our_classes(folder, processor):
    assert type(processor) is Phi3VProcessor
    assert type(processor.image_processor) is type(AutoImageProcessor.from_pretrained(folder)) is Phi3VImageProcessor
    assert isinstance(processor.tokenizer, PreTrainedTokenizerFast)
    assert processor.image_processor.num_crops == CROPS
    assert AutoProcessor.from_pretrained(folder, num_crops=16).image_processor.num_crops == 16


def test_ids_are_the_pieces_tokenized_one_by_one_around_negative_ids(processor):
    inputs = processor(PROMPT, [picture(90, 47)])
    tokenizer = processor.tokenizer
    before, after = (
        tokenizer(piece)["input_ids"] for piece in ("<|user|>\n", "\nwhat is this?<|end|>\n<|assistant|>\n")
    )
    assert before[0] == after[0] == BOS, "the text after an image starts with a begin-of-text token too"
    assert inputs["input_ids"].tolist() == [before + [-1] * tokens_of(90, 47) + after]
    assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    expected = processor.image_processor(picture(90, 47), return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "image_sizes", "input_ids", "pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_sizes"], expected["image_sizes"])
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_sizes"].dtype == inputs["input_ids"].dtype == torch.int64


def test_an_image_by_itself_in_the_prompt(processor):
    inputs = processor("<|image_1|>", picture(20, 20))
    assert inputs["input_ids"].tolist() == [[BOS, *[-1] * tokens_of(20, 20), BOS]]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=str)
def test_images_go_where_their_number_stands(processor, order):
    pictures = [picture(90, 47, seed=1), picture(20, 60, seed=2)]
    text = "a<|image_{}|>b<|image_{}|>c".format(*order)
    inputs = processor(text, pictures)
    ids = [token for token in inputs["input_ids"][0].tolist() if token < 0]
    assert ids == [-number for number in order for _ in range(tokens_of(*pictures[number - 1].size))]
    alone = [processor(PROMPT, pictures[number - 1]) for number in order]
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(inputs[name], torch.cat([single[name] for single in alone])), "in reading order"


def test_a_batch_is_its_rows_padded_on_the_left(processor):
    pictures = [picture(90, 47, seed=1), picture(20, 60, seed=2), picture(50, 50, seed=3)]
    prompts = [PROMPT, "hello", "<|image_1|> and <|image_2|>"]
    rows = [processor(PROMPT, pictures[:1]), processor("hello"), processor(prompts[2], pictures[1:])]
    nested = [pictures[:1], [], pictures[1:]]
    for images in (pictures, nested):
        batch = processor(prompts, images, padding=True)
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            length = row["input_ids"].shape[1]
            assert torch.equal(ids[-length:], row["input_ids"][0])
            assert (ids[:-length] == PAD).all()
            assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert torch.equal(batch["pixel_values"], torch.cat([rows[0]["pixel_values"], rows[2]["pixel_values"]]))
    right = processor(prompts, pictures, padding=True, padding_side="right")
    assert (right["input_ids"][1, rows[1]["input_ids"].shape[1] :] == PAD).all()
    wide = processor(prompts, pictures, padding="max_length", max_length=100)
    assert wide["input_ids"].shape == (3, 100)


def test_text_only_is_the_tokenizers(processor):
    inputs = processor("what is this?")
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert inputs["input_ids"].tolist() == [processor.tokenizer("what is this?")["input_ids"]]
    assert processor("what?", return_tensors=None)["input_ids"] == [processor.tokenizer("what?")["input_ids"]]
    bare = processor("a<|image_1|>b", picture(9, 9), add_special_tokens=False)["input_ids"]
    assert BOS not in bare[0].tolist()


CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "<|image_1|>\n<|image_2|>\nwhat is this?"},
    {"role": "assistant", "content": "a page"},
    {"role": "user", "content": "<|image_3|>\nand this?"},
]


def typed(pictures: list) -> list[dict]:
    image = [{"type": "image", "image": each} for each in pictures]
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [*image[:2], {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a page"}]},
        {"role": "user", "content": [image[2], {"type": "text", "text": "and this?"}]},
    ]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[:3], CONVERSATION[:2]], ids=len)
def test_strings_are_written_by_the_public_template(processor, messages, add_generation_prompt):
    expected = processor.tokenizer.apply_chat_template(
        messages, chat_template=PUBLIC_TEMPLATE, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


def test_typed_content_numbers_its_images(processor):
    pictures = [picture(90, 47, seed=1), picture(20, 60, seed=2), picture(50, 50, seed=3)]
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert processor.apply_chat_template(typed(pictures), add_generation_prompt=True) == text
    found = processor.apply_chat_template(
        typed(pictures), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(text, pictures)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoding_shows_an_image_as_its_placeholder(processor):
    ids = processor("what<|image_1|>is<|image_2|>this", [picture(9, 9), picture(9, 9)])["input_ids"]
    assert processor.decode(ids[0]) == "<s> what<|image_1|><s> is<|image_2|><s> this"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["whatisthis"]
    assert processor.post_process_image_text_to_text(ids) == ["whatisthis"]
    assert processor.decode(5) == processor.tokenizer.decode([5])


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    again = AutoProcessor.from_pretrained(tmp_path)
    inputs, expected = again(PROMPT, picture(90, 47)), processor(PROMPT, picture(90, 47))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert again.chat_template == processor.chat_template


MISMATCHES = [
    ("<|image_1|>", 0, "placeholders for 1 images, got 0"),
    ("<|image_1|>", 2, "placeholders for 1 images, got 2"),
    ("no image", 1, "placeholders for 0 images, got 1"),
    ("<|image_2|>", 1, r"prompt 0 has <\|image_2\|> for 1 images: number them 1 to 1"),
    ("<|image_1|><|image_3|>", 2, r"<\|image_1\|>, <\|image_3\|> for 2 images: number them 1 to 2"),
    (["<|image_1|>", "b"], 2, "placeholders for 1 images, got 2"),
]


@pytest.mark.parametrize("text,images,message", MISMATCHES)
def test_images_that_do_not_match_the_placeholders_are_refused(processor, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text, [picture(9, 9)] * images or None)


def test_nested_images_of_the_wrong_prompt_are_refused(processor):
    with pytest.raises(ValueError, match="prompt 1 has no placeholder for 1 images"):
        processor(["<|image_1|>", "b"], [[picture(9, 9)], [picture(9, 9)]])


def test_no_text_and_truncated_images_are_refused(processor):
    with pytest.raises(ValueError, match="needs text"):
        processor(images=[picture(9, 9)])
    with pytest.raises(ValueError, match="truncating it to 10 would cut an image"):
        processor(PROMPT, picture(9, 9), truncation=True, max_length=10)
    assert processor("what is this?", truncation=True, max_length=4)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    "file,message", [("preprocessor_config.json", "preprocessor_config.json"), ("tokenizer.json", "tokenizer")]
)
def test_missing_processor_files_are_named(folder, tmp_path, file, message):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).unlink()
    with pytest.raises((OSError, ValueError), match=message):
        AutoProcessor.from_pretrained(tmp_path / "copy")
