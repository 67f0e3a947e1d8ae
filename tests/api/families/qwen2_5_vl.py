from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, MROPE, TOKENS_PER_IMAGE, VIDEO, Family, Images

IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=BEGIN_IMAGE,
    vision_end_token_id=END_IMAGE,
    tie_word_embeddings=False,
)


def config(text: dict) -> Qwen2_5_VLConfig:
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
        **IDS,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """8x8 patches, 2 frames of 4x4x3 each."""
    return {
        "pixel_values": images.draw(64, 3 * 2 * 4 * 4).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * len(images)).view(len(images), 3),
        "mm_token_type_ids": (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int(),
    }


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Two temporal patches of 4x4 tokens, on their own time axis."""
    return [VIDEO] * 2 * TOKENS_PER_IMAGE, {
        "pixel_values_videos": videos.draw(2 * 64, 3 * 2 * 4 * 4).flatten(0, 1),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


FAMILY = Family(
    Qwen2_5_VLForConditionalGeneration,
    config,
    processor,
    "model.visual",
    video=video,
    mrope=True,
    bare_images=False,
)
