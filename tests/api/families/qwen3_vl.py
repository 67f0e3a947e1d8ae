from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, MROPE, TOKENS_PER_IMAGE, VIDEO, Family, Images
from families.qwen2_5_vl import IDS, processor

TOWER = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1],  # both tower layers, to the first two of three decoder layers
)


def config(text: dict) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={"rope_parameters": MROPE, **text},
        vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Two frames of 4x4 tokens, each behind its timestamp."""
    frame = [BEGIN_IMAGE, *[VIDEO] * TOKENS_PER_IMAGE, END_IMAGE]
    return [70, *frame, 71, *frame], {
        "pixel_values_videos": videos.draw(2 * 64, 3 * 2 * 4 * 4).flatten(0, 1),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }


FAMILY = Family(
    Qwen3VLForConditionalGeneration, config, processor, "model.visual", video=video, mrope=True, bare_images=False
)
