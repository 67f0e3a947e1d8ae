from __future__ import annotations

from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

from families.aya_vision import DECODER, TOWER, processor
from families.facts import IMAGE, Family


def config(text: dict) -> Cohere2VisionConfig:
    return Cohere2VisionConfig(
        text_config={**DECODER, **text},
        vision_config=TOWER,
        alignment_intermediate_size=32,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


FAMILY = Family(Cohere2VisionForConditionalGeneration, config, processor, "model.vision_tower")
