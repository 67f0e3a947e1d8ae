from __future__ import annotations

from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, VISION, Family, Images


def config(text: dict) -> InternVLConfig:
    return InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={**VISION, "image_size": (32, 32), "patch_size": (4, 4)},
        image_token_id=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 32, 32)}


FAMILY = Family(InternVLForConditionalGeneration, config, processor, "model.vision_tower")
