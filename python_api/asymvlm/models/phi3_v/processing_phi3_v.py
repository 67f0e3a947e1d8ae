"""Prompts of Phi-3.5-Vision: text around ``<|image_1|>``, ``<|image_2|>``, ... becomes ids around -1, -2, ..."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, cast

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

# the public template for a string; a list of typed parts is written as people write that string by hand
CHAT_TEMPLATE = (
    "{% set image = namespace(number=0) %}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set image.number = image.number + 1 %}"
    "{{ '<|image_' + image.number|string + '|>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\n' }}{% endif %}"
)
PADDING = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
_PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


class Phi3VProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {}  # type: ignore[misc]


class Phi3VProcessor(ProcessorMixin):
    """The tokenizer and the image processor as one.

    Batches are padded on the left, where generation needs it; ``padding_side="right"`` overrides.
    """

    valid_processor_kwargs = Phi3VProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(self, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Model inputs for one prompt or a batch.

        Each piece of text between images is tokenized by itself, as the public code does: the text after an image
        starts with a begin-of-text token.

        Args:
            text: a prompt, or a list of them. Its images are numbered from 1, in any order.
            images: the images of all prompts: one, a list, or a list for each prompt.
            kwargs: of the tokenizer (``padding``, ``max_length``, ...) and the image processor (``num_crops``).
        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, S)``; with images ``pixel_values`` and ``image_sizes`` too, in
            reading order of the placeholders. Tensors, unless ``return_tensors`` says otherwise.
        Raises:
            ValueError: if there is no text, placeholders and images do not match, or ``max_length`` would cut an image.
        """
        if text is None:
            raise ValueError("Phi3VProcessor needs text: an image goes where <|image_1|> stands")
        kinds: Any = Phi3VProcessorKwargs
        merged = self._merge_kwargs(kinds, self.tokenizer.init_kwargs, **kwargs)
        options = merged["text_kwargs"]
        prompts = [text] if isinstance(text, str) else list(text)
        numbers = [[int(number) for number in _PLACEHOLDER.findall(prompt)] for prompt in prompts]
        per_prompt = _images_of_prompts(images, numbers)
        views: dict[str, Any] = {}
        counts: list[int] = []
        if any(per_prompt):
            flat = [image for pictures in per_prompt for image in pictures]
            num_crops = merged["images_kwargs"].get("num_crops")
            views = dict(self.image_processor(flat, return_tensors="pt", num_crops=num_crops))
            counts = views.pop("num_img_tokens").tolist()
        ids, order, first = [], [], 0
        for prompt, tags, pictures in zip(prompts, numbers, per_prompt):
            here = [first + tag - 1 for tag in tags]
            ids.append(self._ids(prompt, tags, [counts[place] for place in here], options))
            order += here
            first += len(pictures)
        padding = {name: options[name] for name in PADDING if options.get(name) is not None}
        padded = self.tokenizer.pad({"input_ids": ids}, **{"padding": False, **padding}, return_attention_mask=True)
        data = {name: padded[name] for name in ("input_ids", "attention_mask")}
        data |= {name: value[order] for name, value in views.items()}
        return BatchFeature(data, tensor_type=options.get("return_tensors", "pt"))

    def _ids(self, prompt: str, tags: Sequence[int], counts: Sequence[int], options: dict[str, Any]) -> list[int]:
        special = options.get("add_special_tokens", True)
        texts = _PLACEHOLDER.split(prompt)[::2]  # the odd pieces are the numbers
        chunks = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        ids = list(chunks[0])
        for tag, count, chunk in zip(tags, counts, chunks[1:]):
            ids += [-tag] * count + chunk
        most = options.get("max_length") if options.get("truncation") else None
        if most is None or len(ids) <= most:
            return ids
        if tags:
            raise ValueError(f"a prompt with images has {len(ids)} tokens, truncating it to {most} would cut an image")
        return self.tokenizer(prompt, add_special_tokens=special, truncation=True, max_length=most)["input_ids"]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Text of a row of ids, or of each row; an image is its placeholder, or nothing where specials are skipped."""
        rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(rows, int):
            rows = [rows]
        if len(rows) and not isinstance(rows[0], int):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]
        texts = []
        for image, run in itertools.groupby(rows, lambda token: min(token, 0)):
            if image == 0:
                texts.append(self.tokenizer.decode(list(run), skip_special_tokens=skip_special_tokens, **kwargs))
            elif not skip_special_tokens:
                texts.append(f"<|image_{-image}|>")
        return "".join(texts)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any):
        return self.decode(generated_outputs, skip_special_tokens, **kwargs)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        return self.image_processor.calc_num_image_tokens_from_image_size(width, height)


def _images_of_prompts(images: Any, numbers: list[list[int]]) -> list[list[Any]]:
    """The images of each prompt, by number."""
    wanted = [len(set(tags)) for tags in numbers]
    nested = isinstance(images, (list, tuple)) and len(images) > 0 and isinstance(images[0], (list, tuple))
    if nested and len(images) == len(numbers):
        groups = [list(group) for group in images]
    else:
        flat: list[Any] = [] if images is None else list(cast("Any", make_flat_list_of_images(images)))
        if len(flat) != sum(wanted):
            raise ValueError(f"the text has placeholders for {sum(wanted)} images, got {len(flat)} images")
        ends = list(itertools.accumulate(wanted))
        groups = [flat[end - count : end] for count, end in zip(wanted, ends)]
    for row, (tags, group) in enumerate(zip(numbers, groups)):
        found = sorted(set(tags))
        if found != list(range(1, len(group) + 1)):
            names = ", ".join(f"<|image_{number}|>" for number in found) or "no placeholder"
            raise ValueError(f"prompt {row} has {names} for {len(group)} images: number them 1 to {len(group)}")
    return groups
