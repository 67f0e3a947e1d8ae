from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from families.facts import IMAGE, VIDEO, VISION, Family, Images


def config(text: dict) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": 8, **VISION},
        image_grid_pinpoints=[[8, 24]],
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """A whole view and three crops in a row, 2x2 patches each."""
    return {"pixel_values": images.draw(4, 3, 8, 8), "image_sizes": torch.tensor([[8, 24]] * len(images))}


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Twenty frames of one pooled token and a newline."""
    return [VIDEO] * 21, {"pixel_values_videos": videos.draw(20, 3, 8, 8)}


FAMILY = Family(
    LlavaOnevisionForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    image=(IMAGE,) * (4 + 2 * 7),
    separators=frozenset({4 + 6, 4 + 13}),  # the newlines of two rows of six
    video=video,
    video_separators=frozenset({20}),
)
