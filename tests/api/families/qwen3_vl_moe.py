from __future__ import annotations

from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from families.facts import MROPE, Family
from families.qwen2_5_vl import IDS, processor
from families.qwen3_vl import TOWER, video


def config(text: dict) -> Qwen3VLMoeConfig:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return Qwen3VLMoeConfig(
        text_config={"rope_parameters": MROPE, **experts, **text},
        vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


FAMILY = Family(
    Qwen3VLMoeForConditionalGeneration, config, processor, "model.visual", video=video, mrope=True, bare_images=False
)
