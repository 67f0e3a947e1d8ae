from __future__ import annotations

from transformers import Glm46VConfig, Glm46VForConditionalGeneration

from families.facts import MROPE, Family
from families.glm4v import IDS, TOWER
from families.qwen2_5_vl import processor


def config(text: dict) -> Glm46VConfig:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return Glm46VConfig(
        text_config={"model_type": "glm4v_text", "rope_parameters": rope, **text},
        vision_config={"model_type": "glm4v_vision", **TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


FAMILY = Family(Glm46VForConditionalGeneration, config, processor, "model.visual", mrope=True, bare_images=False)
