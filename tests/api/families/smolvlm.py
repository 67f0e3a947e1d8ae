from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from families.facts import IMAGE, VISION, Family
from families.idefics3 import processor


def config(text: dict) -> SmolVLMConfig:
    return SmolVLMConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"image_size": 32, **VISION},
        scale_factor=2,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


FAMILY = Family(SmolVLMForConditionalGeneration, config, processor, "model.vision_model")
