from __future__ import annotations

import dataclasses

from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from families import qwen3_5
from families.qwen2_5_vl import IDS


def config(text: dict) -> Qwen3_5MoeConfig:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    return Qwen3_5MoeConfig(
        text_config={"rope_parameters": qwen3_5.ROPE, **experts, **text, **qwen3_5.LINEAR},
        vision_config=qwen3_5.tower(text),
        **IDS,
    )


FAMILY = dataclasses.replace(qwen3_5.FAMILY, model=Qwen3_5MoeForConditionalGeneration, config=config)
