from __future__ import annotations

import dataclasses

from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

from families import glm4v
from families.facts import MROPE
from families.glm4v import IDS, TOWER

EXPERTS = dict(
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)


def config(text: dict) -> Glm4vMoeConfig:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return Glm4vMoeConfig(
        text_config={"rope_parameters": rope, **EXPERTS, **text},
        vision_config={**TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


FAMILY = dataclasses.replace(glm4v.FAMILY, model=Glm4vMoeForConditionalGeneration, config=config)
