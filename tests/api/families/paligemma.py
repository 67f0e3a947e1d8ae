from __future__ import annotations

import torch
from torch import Tensor
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from families.facts import IMAGE, VISION, Family, Images

ANSWERS_ARE_CAUSAL = "_update_model_kwargs_for_generation" in vars(PaliGemmaForConditionalGeneration)
WRONG = {
    "test_generate_with_closed_columns_is_the_recomputed_greedy_loop": "without a growing cache, this transformers "
    "version puts generated tokens into the bidirectional prefix"
}


def config(text: dict) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        text_config={"model_type": "gemma", **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False, **VISION},
        image_token_index=IMAGE,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 16, 16), "token_type_ids": torch.zeros_like(input_ids)}


FAMILY = Family(
    PaliGemmaForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    first_position=1,
    norm_offset=1.0,
    chunked_prefill=False,
    generated={"token_type_ids": 1},
    wrong_without_patch={} if ANSWERS_ARE_CAUSAL else WRONG,
)
