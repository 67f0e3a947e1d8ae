from __future__ import annotations

import dataclasses

from transformers import Glm46VConfig, Glm46VForConditionalGeneration

from families import glm4v
from families.facts import MROPE
from families.glm4v import IDS, TOWER


def config(text: dict) -> Glm46VConfig:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    return Glm46VConfig(
        text_config={"model_type": "glm4v_text", "rope_parameters": rope, **text},
        vision_config={"model_type": "glm4v_vision", **TOWER, "out_hidden_size": text["hidden_size"]},
        **IDS,
    )


FAMILY = dataclasses.replace(glm4v.FAMILY, model=Glm46VForConditionalGeneration, config=config)
