from __future__ import annotations

from torch import Tensor
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from families.facts import IMAGE, VIDEO, VISION, Family, Images
from families.llava_next import FAMILY as LLAVA_NEXT


def config(text: dict) -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16, **VISION},
        image_grid_pinpoints=[[8, 24]],
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Twenty frames of 2x2 patches, pooled to one token each."""
    return [VIDEO] * 20, {"pixel_values_videos": videos.draw(20, 3, 8, 8)}


FAMILY = Family(
    LlavaNextVideoForConditionalGeneration,
    config,
    LLAVA_NEXT.processor,
    "model.vision_tower",
    image=LLAVA_NEXT.image,
    separators=LLAVA_NEXT.separators,
    video=video,
    seed=5,
)
