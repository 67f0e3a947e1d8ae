from __future__ import annotations

import torch
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from families.facts import IMAGE, ROW_END, VISION, Family, Images


def config(text: dict) -> Mistral3Config:
    return Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **text},
        vision_config={"model_type": "pixtral", "image_size": 32, **VISION},
        spatial_merge_size=2,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * len(images))}


FAMILY = Family(
    Mistral3ForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    image=(*(IMAGE,) * 4, ROW_END) * 4,
    atol=7e-5,  # fp32 is 3.4e-5 from float64 without any patch
)
