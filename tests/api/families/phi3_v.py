from __future__ import annotations

import torch
from torch import Tensor

from asymvlm.models.phi3_v import Phi3VConfig, Phi3VForCausalLM
from families.facts import IMAGE, VISION, Family, Images

# 1 x 3 crops of 2 x 2 tokens and a global view: two rows of six and a separator, one separator, two rows of two and one
SEPARATORS = frozenset({6, 13, 14, 17, 20})


def config(text: dict) -> Phi3VConfig:
    factors = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.5, 2.5, 4.0, 8.0])
    return Phi3VConfig(
        image_token_id=IMAGE,
        vision_config={**VISION, "image_size": 16},
        original_max_position_embeddings=256,
        rope_scaling=factors,
        **text,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {
        "pixel_values": images.draw(4, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 48]] * len(images)).view(-1, 2),
    }


FAMILY = Family(
    Phi3VForCausalLM,
    config,
    processor,
    "model.vision_embed_tokens",
    image=(IMAGE,) * 21,
    separators=SEPARATORS,
)
