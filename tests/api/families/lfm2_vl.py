from __future__ import annotations

import torch
from torch import Tensor
from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

from families.facts import IMAGE, VISION, Family, Images


def config(text: dict) -> Lfm2VlConfig:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    decoder = {**text, "num_hidden_layers": len(kinds), "layer_types": kinds}
    return Lfm2VlConfig(
        text_config={"model_type": "lfm2", "block_auto_adjust_ff_dim": False, **decoder},
        vision_config={"model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False, **VISION},
        projector_hidden_size=16,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {
        "pixel_values": images.draw(64, 3 * 4 * 4),
        "spatial_shapes": torch.tensor([[8, 8]] * len(images)).view(-1, 2),
        "pixel_attention_mask": torch.ones(len(images), 64, dtype=torch.long),
    }


FAMILY = Family(Lfm2VlForConditionalGeneration, config, processor, "model.vision_tower", recurrent=("conv",), atol=3e-5)
