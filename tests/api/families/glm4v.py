from __future__ import annotations

import torch
from torch import Tensor
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, MROPE, TOKENS_PER_IMAGE, VIDEO, Family, Images
from families.qwen2_5_vl import processor as image_processor

BEGIN_VIDEO, END_VIDEO = 106, 107

IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    image_start_token_id=BEGIN_IMAGE,
    image_end_token_id=END_IMAGE,
    video_start_token_id=BEGIN_VIDEO,
    video_end_token_id=END_VIDEO,
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


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """Placeholders inside a video are its frames'."""
    inside = (input_ids == BEGIN_VIDEO).cumsum(-1) > (input_ids == END_VIDEO).cumsum(-1)
    types = (input_ids == IMAGE).int() * (1 + inside.int())
    return {**image_processor(input_ids, images), "mm_token_type_ids": types}


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Two frames of 4x4 tokens, each behind its timestamp."""
    frame = [BEGIN_IMAGE, *[IMAGE] * TOKENS_PER_IMAGE, END_IMAGE]
    return [BEGIN_VIDEO, *frame, 70, *frame, 71, END_VIDEO], {
        "pixel_values_videos": videos.draw(2 * 64, 3 * 2 * 4 * 4).flatten(0, 1),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }


FAMILY = Family(
    Glm4vForConditionalGeneration,
    config,
    processor,
    "model.visual",
    video=video,
    video_alone=True,
    mrope=True,
    bare_images=False,
    atol=5e-5,  # fp32 is 2.5e-5 from float64 without any patch
)
