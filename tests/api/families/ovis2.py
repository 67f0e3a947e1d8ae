from __future__ import annotations

from torch import Tensor
from transformers import Ovis2Config, Ovis2ForConditionalGeneration

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, VISION, Family, Images


def config(text: dict) -> Ovis2Config:
    return Ovis2Config(
        text_config={"model_type": "qwen2", **text},
        vision_config={**VISION, "image_size": 16, "vocab_size": 40, "num_visual_indicator_tokens": 2},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[BEGIN_IMAGE, END_IMAGE],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 16, 16)}


FAMILY = Family(Ovis2ForConditionalGeneration, config, processor, "model.vision_tower", atol=3e-5)
