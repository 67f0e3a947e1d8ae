from __future__ import annotations

from torch import Tensor
from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

from families.facts import IMAGE, VISION, Family, Images

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
DECODER = {"model_type": "cohere2", "layer_types": KINDS, "sliding_window": 256, "logit_scale": 1.0}
TOWER = {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False, **VISION}


def config(text: dict) -> AyaVisionConfig:
    return AyaVisionConfig(
        text_config={**DECODER, **text},
        vision_config=TOWER,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 32, 32)}


FAMILY = Family(AyaVisionForConditionalGeneration, config, processor, "model.vision_tower", seed=5, atol=4e-5)
