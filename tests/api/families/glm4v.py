from __future__ import annotations

from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, MROPE, VIDEO, Family
from families.qwen2_5_vl import processor

IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    image_start_token_id=BEGIN_IMAGE,
    image_end_token_id=END_IMAGE,
    video_start_token_id=106,
    video_end_token_id=107,
    tie_word_embeddings=False,
)
TOWER = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    image_size=32,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
)


def config(text: dict) -> Glm4vConfig:
    return Glm4vConfig(
        text_config={"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **text},
        vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


FAMILY = Family(Glm4vForConditionalGeneration, config, processor, "model.visual", mrope=True, bare_images=False)
