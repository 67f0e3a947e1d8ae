from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from families.facts import IMAGE, VISION, Family, Images


def config(text: dict) -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16, **VISION},
        image_grid_pinpoints=[[8, 24]],
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """A whole view and three crops in a row, 2x2 patches each."""
    return {"pixel_values": images.draw(4, 3, 8, 8), "image_sizes": torch.tensor([[8, 24]] * len(images))}


FAMILY = Family(
    LlavaNextForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    image=(IMAGE,) * (4 + 2 * 7),
    separators=frozenset({4 + 6, 4 + 13}),  # the newlines of two rows of six
    seed=4,
)
