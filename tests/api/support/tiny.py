"""Tiny random-weight VLMs and processor-like inputs: 16 prunable tokens an image, a different text in every row.

A new model family is one file in ``families``; everything else here and in the tests is shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from families import FAMILIES, LANGUAGE, REPRESENTATIVE
from families.facts import (
    AUDIO,
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    IMAGE,
    PAD,
    ROW_END,
    TEXT,
    TOKENS_PER_IMAGE,
    VIDEO,
    VOCAB,
    Family,
    Images,
)
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Row:
    """One sample: text, ``images`` images, text. ``bare`` images have no begin and end tokens and no text between."""

    before: tuple[int, ...]
    images: int
    after: tuple[int, ...]
    bare: bool = False

    def ids(self, image: Sequence[int] = (IMAGE,) * TOKENS_PER_IMAGE) -> list[int]:
        if self.bare:
            return [BOS, *self.before, *list(image) * self.images, *self.after]
        separated = [[40 + i] * (i > 0) + [BEGIN_IMAGE, *image, END_IMAGE] for i in range(self.images)]
        return [BOS, *self.before, *itertools.chain(*separated), *self.after]


ONE = Row((5, 6, 7), 1, (8, 9, 10, 11))
LONGER = Row((13, 14), 1, (15, 16, 17, 18, 19, 20, 21))
TWO = Row((22, 23, 24, 25), 2, (26, 27, 28))
ENDS_IN_IMAGE = Row((41, 42, 43, 44, 45), 1, (), bare=True)
ADJACENT = Row((46, 47, 48), 2, (49, 50, 51, 52), bare=True)
LONGEST = Row((53, 54, 55, 56), 1, (57, 58, 59, 60, 61, 62, 63))
TEXT_ONLY = Row((29, 30), 0, (31, 32, 33))
FIRST = Row((), 1, (64, 65, 66))  # the image before any text, behind all, and between nothing but the template
LAST = Row((67, 68, 69, 70), 1, ())
TEMPLATE = Row((), 1, ())

SPECIAL = [PAD, EOS, BOS, IMAGE, VIDEO, BEGIN_IMAGE, END_IMAGE, ROW_END, AUDIO]

# name -> (rows, padding side); the same names parametrize the tests
BATCHES: dict[str, tuple[tuple[Row, ...], str]] = {
    "single": ((ONE,), "left"),
    "two_images": ((TWO,), "left"),
    "left_padded": ((ONE, LONGER, TWO), "left"),
    "one_image_each": ((ONE, LONGER, LONGEST), "left"),
    "right_padded": ((ONE, LONGER, TWO), "right"),
    "image_free_row": ((ONE, TEXT_ONLY, TWO), "left"),
    "ends_in_image": ((ENDS_IN_IMAGE, LONGER), "left"),
    "different_places": ((FIRST, LAST, TEMPLATE), "left"),
    "text_only": ((TEXT_ONLY, Row((34,), 0, (35, 36, 37, 38, 39))), "left"),
    "long_texts": ((Row(tuple(range(5, 19)), 0, ()), Row((34, 71, 72), 0, tuple(range(40, 57)))), "left"),
}


def build(name: str, attention: str | None = None, **text: object) -> PreTrainedModel:
    """An fp32 model in eval mode, every parameter drawn; ``text`` overrides its text configuration."""
    family = {**FAMILIES, **LANGUAGE}[name]
    config = family.config({**TEXT, **text})
    config._attn_implementation = attention or family.attention
    model = family.model(config)
    generator = torch.Generator().manual_seed(family.seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                # layers outweigh the last token, so that answers vary
                gain = 1.0 if "embed" in parameter_name or "lm_head" in parameter_name else 1.35
                fan_in = parameter.shape[-1] if "experts" in parameter_name else parameter[0].numel()
                parameter.copy_(gain * noise / fan_in**0.5)
            else:
                is_scale = "norm" in parameter_name and parameter_name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 - family.norm_offset if is_scale else 0.0))
        # a greedy answer never stops early and never holds an image token
        model.get_output_embeddings().weight[SPECIAL] = 0
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    return model.float().eval()


def make_inputs(
    name: str, rows: Sequence[Row], padding: str = "left", seed: int = 0, first_image: int = 0
) -> dict[str, Tensor]:
    """What the family's processor would return for ``rows``; each image draws its own pixels from ``seed``."""
    family = {**FAMILIES, **LANGUAGE}[name]
    sequences = [row.ids(family.image) for row in rows]
    length = max(map(len, sequences))
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        start = length - len(sequence) if padding == "left" else 0
        input_ids[b, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[b, start : start + len(sequence)] = 1
    images = Images(sum(row.images for row in rows), seed, first_image)
    extra = family.processor(input_ids, images)
    if not images.count:
        extra = {key: value for key, value in extra.items() if value.shape == input_ids.shape}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **extra}


def make_batch(name: str, batch: str, seed: int = 0) -> dict[str, Tensor]:
    rows, padding = BATCHES[batch]
    return make_inputs(name, rows, padding, seed)


def make_video(name: str, with_image: bool = False) -> dict[str, Tensor]:
    """A prompt with a video, behind an image or alone."""
    image, family = make_batch(name, "single"), FAMILIES[name]
    before = image["input_ids"][0].tolist() if with_image else [BOS]
    video, extra = family.video(Images(1, seed=4))
    ids = torch.tensor([[*before, 60, *video, 61, 62, 63]])
    types = family.processor(ids, Images(0))
    inputs = {key: value for key, value in types.items() if value.shape == ids.shape}
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    return {**image, **inputs} if with_image else inputs


def single_rows(name: str, batch: str, seed: int = 0) -> list[dict[str, Tensor]]:
    """The rows of ``make_batch``, each by itself, unpadded, with its own images."""
    rows, _ = BATCHES[batch]
    before = itertools.accumulate((row.images for row in rows), initial=0)
    return [make_inputs(name, (row,), seed=seed, first_image=first) for row, first in zip(rows, before)]


def family_of(model: PreTrainedModel) -> Family:
    return next(family for family in [*FAMILIES.values(), *LANGUAGE.values()] if type(model) is family.model)


def vision_columns(model: PreTrainedModel, ids: Tensor) -> list[list[list[int]]]:
    """Columns of each image of each row of ``ids`` (B, S), learned separators left out; a video is one image.

    Images are runs of placeholders, cut where they stand side by side; ids inside the layout of an image do not end it.
    """
    family = family_of(model)
    inside, size = set(family.image) - {IMAGE}, family.image.count(IMAGE)
    rows = []
    for row in ids.tolist():
        images: list[list[int]] = []
        for column in (column for column, token in enumerate(row) if token == IMAGE):
            goes_on = images and len(images[-1]) < size and inside.issuperset(row[images[-1][-1] + 1 : column])
            images = images if goes_on else [*images, []]
            images[-1].append(column)
        images = [[c for place, c in enumerate(image) if place not in family.separators] for image in images]
        video = [column for column, token in enumerate(row) if token == VIDEO]
        video = [column for place, column in enumerate(video) if place not in family.video_separators]
        rows.append([*images, video] if video else images)
    return rows


def make_labels(inputs: dict[str, Tensor]) -> Tensor:
    """Next-token labels on an answer, the text behind a row's last image; all else carries -100."""
    ids = inputs["input_ids"]
    vision = torch.isin(ids, torch.tensor([IMAGE, VIDEO]))
    prompt = (ids == BOS) | (vision.flip(-1).cumsum(-1).flip(-1) > 0)
    return ids.masked_fill(prompt | (inputs["attention_mask"] == 0), -100)


def text_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return (decoder.model if hasattr(decoder, "model") else decoder).layers  # Llama 4 names a model with a head


__all__ = [
    "AUDIO",
    "BATCHES",
    "BEGIN_IMAGE",
    "BOS",
    "END_IMAGE",
    "EOS",
    "FAMILIES",
    "IMAGE",
    "LANGUAGE",
    "PAD",
    "REPRESENTATIVE",
    "ROW_END",
    "TEXT",
    "TOKENS_PER_IMAGE",
    "VIDEO",
    "VOCAB",
    "Images",
    "Row",
    "build",
    "family_of",
    "make_batch",
    "make_inputs",
    "make_labels",
    "make_video",
    "single_rows",
    "text_layers",
    "vision_columns",
]
