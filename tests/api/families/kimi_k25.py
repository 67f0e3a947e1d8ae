from __future__ import annotations

import torch
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from families.facts import VISION, Family, Images
from families.qwen2_5_vl import IDS

LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)


def config(text: dict) -> Kimi_K25Config:
    decoder = {**text, "num_key_value_heads": text["num_attention_heads"]}
    del decoder["head_dim"]
    return Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **LATENT, **decoder},
        vision_config={**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=16,
        **IDS,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {
        "pixel_values": images.draw(64, 3, 4, 4).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * len(images)).view(len(images), 3),
    }


# no video: transformers splits the features by all frames after averaging them to one, and fails
FAMILY = Family(Kimi_K25ForConditionalGeneration, config, processor, "model.vision_tower")
