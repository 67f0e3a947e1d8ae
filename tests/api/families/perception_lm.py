from __future__ import annotations

from torch import Tensor
from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, VIDEO, Family, Images
from families.tower import MapTowerConfig


def config(text: dict) -> PerceptionLMConfig:
    return PerceptionLMConfig(
        text_config={"model_type": "llama", **text},
        vision_config=MapTowerConfig(flat=True, model_args={"embed_dim": 16}),
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """One tile an image, 8x8 patches pooled two by two."""
    return {"pixel_values": images.draw(1, 3, 32, 32)}


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    return [VIDEO] * 2 * TOKENS_PER_IMAGE, {"pixel_values_videos": videos.draw(2, 3, 32, 32)}


FAMILY = Family(PerceptionLMForConditionalGeneration, config, processor, "model.vision_tower", video=video)
