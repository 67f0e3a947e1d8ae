from __future__ import annotations

from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from families.facts import IMAGE, VISION, Family
from families.llava import processor

TOWER = {"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 16}


def config(text: dict) -> VipLlavaConfig:
    return VipLlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={**TOWER, **VISION, "num_hidden_layers": 12},  # as deep as the default choice of layers needs
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


FAMILY = Family(VipLlavaForConditionalGeneration, config, processor, "model.vision_tower")
