"""``pipeline("image-text-to-text")`` must answer from the pruned prompt, with a real processor and a chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checks import uniform
from masked_reference import masked_generate, select
from PIL import Image
from tiny import BOS, EOS, IMAGE, PAD, TOKENS_PER_IMAGE, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import asymvlm

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["user", "assistant", "what", "is", "on", "this", "page", "and", "there"]
GENERATE = dict(do_sample=False, max_new_tokens=6)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    """Words of the tiny vocabulary, 16x16 images of 4x4 patches; saved and loaded as a user's would be."""
    vocabulary = {f"word{i}": i for i in range(VOCAB)}
    special = {PAD: "<pad>", EOS: "</s>", BOS: "<s>", IMAGE: "<image>", VOCAB - 1: "<unk>"}
    for token, word in {**special, **dict(enumerate(WORDS, start=10))}.items():
        del vocabulary[f"word{token}"]
        vocabulary[word] = token
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    folder: Path = tmp_path_factory.mktemp("processor")
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def conversation(seed: int, question: str) -> list[dict]:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


CONVERSATIONS = [conversation(1, "what is on this page"), conversation(2, "what is there and what is on page and this")]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_pipeline_answers_from_the_pruned_prompt(plain, model, processor, batched):
    conversations = CONVERSATIONS if batched else CONVERSATIONS[:1]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [TOKENS_PER_IMAGE] * len(conversations)
    selection = select(plain, inputs, 0.5)
    sequences = masked_generate(plain, inputs, selection.keep, **GENERATE)
    expected = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    unpruned = plain.generate(**inputs, **GENERATE)
    assert not (unpruned == sequences).all(), "pruning must matter"

    ask = pipeline("image-text-to-text", model=model, processor=processor)
    options = dict(generate_kwargs=GENERATE, return_full_text=False, batch_size=len(conversations))
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        answers = ask(text=conversations if batched else conversations[0], **options)
    answers = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    assert [answer["generated_text"].split() for answer in answers] == [text.split() for text in expected]
    assert handle.last.kept == selection.kept
    assert handle.last.index.tolist() == selection.index.tolist()
