from __future__ import annotations

from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, TOKENS_PER_IMAGE, VISION, Family, Images

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def config(text: dict) -> Gemma3Config:
    defaults = dict(num_hidden_layers=len(KINDS), layer_types=KINDS, sliding_window=256, query_pre_attn_scalar=8)
    return Gemma3Config(
        text_config={**text, **defaults, **{key: text[key] for key in text if key not in TEXT}},
        vision_config={"image_size": 32, **VISION},
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=IMAGE,
        boi_token_index=BEGIN_IMAGE,
        eoi_token_index=END_IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 32, 32), "token_type_ids": (input_ids == IMAGE).long()}


FAMILY = Family(
    Gemma3ForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    norm_offset=1.0,
    chunked_prefill=False,
)
