from __future__ import annotations

from torch import Tensor
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from asymvlm.models.video_llava import IMAGES
from families.facts import IMAGE, TOKENS_PER_IMAGE, VIDEO, VISION, Family, Images


def config(text: dict) -> VideoLlavaConfig:
    return VideoLlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 16, **VISION},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {IMAGES: images.draw(3, 16, 16)}


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Two frames, a class token before the patches of each."""
    return [VIDEO] * 2 * (1 + TOKENS_PER_IMAGE), {"pixel_values_videos": videos.draw(2, 3, 16, 16)}


FAMILY = Family(
    VideoLlavaForConditionalGeneration,
    config,
    processor,
    "model.image_tower",
    video=video,
    pixels=IMAGES,
    video_separators=frozenset({0, 1 + TOKENS_PER_IMAGE}),
)
