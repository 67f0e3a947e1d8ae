"""Tiny random-weight VLMs and processor-like inputs: 16 vision tokens an image, a different text in every row.

A new model family is one entry of ``FAMILIES``; everything else here and in the tests is shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VOCAB = 120
PAD, EOS, BOS = 0, 1, 2
IMAGE, VIDEO, BEGIN_IMAGE, END_IMAGE = 100, 101, 102, 103
TOKENS_PER_IMAGE = 16

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
    tie_word_embeddings=False,
)
MROPE = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4)


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model and what its processor adds to ``input_ids`` and ``attention_mask``."""

    model: type[PreTrainedModel]
    config: Callable[..., PretrainedConfig]
    processor: Callable[[Tensor, int, torch.Generator], dict[str, Tensor]]  # (input_ids, images, generator)
    tower: str  # the vision tower's module path
    mrope: bool = False
    bare_images: bool = True  # False where the family needs begin and end tokens around an image
    norm_offset: float = 0.0  # what the norms add to their weight: Gemma's scale is 1 + weight
    chunked_prefill: bool = True  # False where prefill in chunks is wrong without any patch


@dataclass(frozen=True)
class Row:
    """One sample: text, ``images`` images, text. ``bare`` images have no begin and end tokens and no text between."""

    before: tuple[int, ...]
    images: int
    after: tuple[int, ...]
    bare: bool = False

    def ids(self) -> list[int]:
        image = [IMAGE] * TOKENS_PER_IMAGE
        if self.bare:
            return [BOS, *self.before, *image * self.images, *self.after]
        separated = [[40 + i] * (i > 0) + [BEGIN_IMAGE, *image, END_IMAGE] for i in range(self.images)]
        return [BOS, *self.before, *itertools.chain(*separated), *self.after]


ONE = Row((5, 6, 7), 1, (8, 9, 10, 11))
LONGER = Row((13, 14), 1, (15, 16, 17, 18, 19, 20, 21))
TWO = Row((22, 23, 24, 25), 2, (26, 27, 28))
ENDS_IN_IMAGE = Row((41, 42, 43, 44, 45), 1, (), bare=True)
ADJACENT = Row((46, 47, 48), 2, (49, 50, 51, 52), bare=True)
LONGEST = Row((53, 54, 55, 56), 1, (57, 58, 59, 60, 61, 62, 63))
TEXT_ONLY = Row((29, 30), 0, (31, 32, 33))

# name -> (rows, padding side); the same names parametrize the tests
BATCHES: dict[str, tuple[tuple[Row, ...], str]] = {
    "single": ((ONE,), "left"),
    "two_images": ((TWO,), "left"),
    "left_padded": ((ONE, LONGER, TWO), "left"),
    "one_image_each": ((ONE, LONGER, LONGEST), "left"),
    "right_padded": ((ONE, LONGER, TWO), "right"),
    "image_free_row": ((ONE, TEXT_ONLY, TWO), "left"),
    "ends_in_image": ((ENDS_IN_IMAGE, LONGER), "left"),
    "text_only": ((TEXT_ONLY, Row((34,), 0, (35, 36, 37, 38, 39))), "left"),
}


def build(name: str, seed: int = 2, attention: str = "sdpa", **text: object) -> PreTrainedModel:
    """An fp32 model in eval mode, every parameter drawn; ``text`` overrides its text configuration."""
    family = FAMILIES[name]
    config = family.config({**TEXT, **text})
    config._attn_implementation = attention
    model = family.model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                # layers outweigh the last token, so that answers vary
                gain = 1.0 if "embed" in parameter_name or "lm_head" in parameter_name else 1.35
                parameter.copy_(gain * noise / parameter[0].numel() ** 0.5)
            else:
                is_scale = "norm" in parameter_name and parameter_name.endswith("weight")
                parameter.copy_(0.1 * noise + (1.0 - family.norm_offset if is_scale else 0.0))
        # a greedy answer never stops early and never holds an image token
        model.lm_head.weight[[PAD, EOS, BOS, IMAGE, VIDEO, BEGIN_IMAGE, END_IMAGE]] = 0
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    return model.float().eval()


def make_inputs(name: str, rows: Sequence[Row], padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """What the family's processor would return for ``rows``; each image draws its own pixels from ``seed``."""
    sequences = [row.ids() for row in rows]
    length = max(map(len, sequences))
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for b, sequence in enumerate(sequences):
        start = length - len(sequence) if padding == "left" else 0
        input_ids[b, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[b, start : start + len(sequence)] = 1
    images = sum(row.images for row in rows)
    extra = FAMILIES[name].processor(input_ids, images, torch.Generator().manual_seed(1000 + seed))
    if not images:
        extra = {key: value for key, value in extra.items() if value.shape == input_ids.shape}
    return {"input_ids": input_ids, "attention_mask": attention_mask, **extra}


def make_batch(name: str, batch: str, seed: int = 0) -> dict[str, Tensor]:
    rows, padding = BATCHES[batch]
    return make_inputs(name, rows, padding, seed)


def single_rows(name: str, batch: str, seed: int = 0) -> list[dict[str, Tensor]]:
    """The rows of ``make_batch``, each by itself, unpadded, with its own images."""
    rows, _ = BATCHES[batch]
    whole = make_batch(name, batch, seed)
    images = sum(row.images for row in rows)
    singles, first = [], 0
    for row in rows:
        single = make_inputs(name, (row,))
        for key, value in single.items():
            if value.shape != single["input_ids"].shape:  # rows of pixels or of a grid, a fixed number an image
                per_image = whole[key].shape[0] // images
                single[key] = whole[key][first * per_image : (first + row.images) * per_image]
        first += row.images
        singles.append(single)
    return singles


def make_labels(inputs: dict[str, Tensor]) -> Tensor:
    """Next-token labels on text; padding and vision carry -100."""
    ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
    return inputs["input_ids"].masked_fill(ignored, -100)


def text_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.get_decoder().layers


def _llava(text: dict) -> PretrainedConfig:
    return LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 16, **VISION},
        image_token_index=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _gemma3(text: dict) -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    defaults = dict(num_hidden_layers=len(kinds), layer_types=kinds, sliding_window=256, query_pre_attn_scalar=8)
    return Gemma3Config(
        text_config={**text, **defaults, **{key: text[key] for key in text if key not in TEXT}},
        vision_config={"image_size": 32, **VISION},
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=IMAGE,
        boi_token_index=BEGIN_IMAGE,
        eoi_token_index=END_IMAGE,
        tie_word_embeddings=False,
    )


def _qwen2_5_vl(text: dict) -> PretrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={"rope_parameters": MROPE, **text},
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=text["hidden_size"],
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN_IMAGE,
        vision_end_token_id=END_IMAGE,
        tie_word_embeddings=False,
    )


def _llava_processor(input_ids: Tensor, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}


def _gemma3_processor(input_ids: Tensor, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(images, 3, 32, 32, generator=generator),
        "token_type_ids": (input_ids == IMAGE).long(),
    }


def _qwen_processor(input_ids: Tensor, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(images * 64, 3 * 2 * 4 * 4, generator=generator),  # 8x8 patches, 2 frames of 4x4x3
        "image_grid_thw": torch.tensor([[1, 8, 8]] * images).view(images, 3),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
    }


FAMILIES: dict[str, Family] = {
    "llava": Family(LlavaForConditionalGeneration, _llava, _llava_processor, "model.vision_tower"),
    "gemma3": Family(
        Gemma3ForConditionalGeneration,
        _gemma3,
        _gemma3_processor,
        "model.vision_tower",
        norm_offset=1.0,
        chunked_prefill=False,
    ),
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        _qwen2_5_vl,
        _qwen_processor,
        "model.visual",
        mrope=True,
        bare_images=False,
    ),
}
