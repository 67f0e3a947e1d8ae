from __future__ import annotations

import dataclasses

from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

from families import mistral3
from families.facts import IMAGE, TOKENS_PER_IMAGE, VISION


def config(text: dict) -> LightOnOcrConfig:
    return LightOnOcrConfig(
        text_config={"model_type": "qwen3", **text},
        vision_config={"model_type": "pixtral", "image_size": 32, "head_dim": 8, **VISION},
        spatial_merge_size=2,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


FAMILY = dataclasses.replace(
    mistral3.FAMILY,
    model=LightOnOcrForConditionalGeneration,
    config=config,
    tower="model.vision_encoder",
    image=(IMAGE,) * TOKENS_PER_IMAGE,
    seed=3,
)
