from __future__ import annotations

from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, VISION, Family, Images


def config(text: dict) -> LlavaConfig:
    return LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 16, **VISION},
        image_token_index=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 16, 16)}


FAMILY = Family(LlavaForConditionalGeneration, config, processor, "model.vision_tower")
