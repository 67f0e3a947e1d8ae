from __future__ import annotations

from transformers import FastVlmConfig, FastVlmForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, Family
from families.llava import processor
from families.tower import MapTowerConfig


def config(text: dict) -> FastVlmConfig:
    return FastVlmConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=MapTowerConfig(),
        image_token_index=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=False,
    )


FAMILY = Family(FastVlmForConditionalGeneration, config, processor, "model.vision_tower")
