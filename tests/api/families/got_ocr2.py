from __future__ import annotations

from torch import Tensor
from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, Family, Images


def config(text: dict) -> GotOcr2Config:
    tower = dict(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
    )
    return GotOcr2Config(
        text_config={"model_type": "qwen2", **text},
        vision_config=tower,
        image_token_index=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 64, 64)}


FAMILY = Family(GotOcr2ForConditionalGeneration, config, processor, "model.vision_tower", attention="eager")
