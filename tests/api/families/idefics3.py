from __future__ import annotations

import torch
from torch import Tensor
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from families.facts import IMAGE, TOKENS_PER_IMAGE, VISION, Family, Images


def config(text: dict) -> Idefics3Config:
    return Idefics3Config(
        text_config={"model_type": "llama", **text},
        vision_config={"image_size": 32, **VISION},
        scale_factor=2,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """Tiles by row of the batch, padded with all-zero ones."""
    counts = ((input_ids == IMAGE).sum(-1) // TOKENS_PER_IMAGE).tolist()
    pixels = torch.zeros(len(input_ids), max(counts), 3, 32, 32)
    for b, tiles in enumerate(images.draw(3, 32, 32).split(counts)):
        pixels[b, : len(tiles)] = tiles
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(*pixels.shape[:2], 32, 32).bool()}


FAMILY = Family(Idefics3ForConditionalGeneration, config, processor, "model.vision_model")
