from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from families.facts import (
    AUDIO,
    BEGIN_IMAGE,
    END_IMAGE,
    IMAGE,
    TEXT,
    TOKENS_PER_IMAGE,
    VIDEO,
    VISION,
    VOCAB,
    Family,
    Images,
)

PLACES = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(-1)  # x before y, row by row
KINDS = ["sliding_attention", "full_attention"] * 2
DECODER = dict(
    num_hidden_layers=len(KINDS),
    layer_types=KINDS,
    sliding_window=256,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
    use_bidirectional_attention="vision",
)


def config(text: dict) -> Gemma4Config:
    tower = {**VISION, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2, "position_embedding_size": 8}
    return Gemma4Config(
        text_config={**text, **DECODER, **{key: text[key] for key in text if key not in TEXT}},
        vision_config=tower,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=BEGIN_IMAGE,
        eoi_token_id=END_IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """8x8 patches, pooled two by two."""
    return {
        "pixel_values": images.draw(64, 3 * 4 * 4),
        "image_position_ids": PLACES.expand(len(images), -1, -1),
        "mm_token_type_ids": (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int(),
    }


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    """Two frames of 8x8 patches, each behind its timestamp."""
    frame = [BEGIN_IMAGE, *[VIDEO] * TOKENS_PER_IMAGE, END_IMAGE]
    pixels, places = videos.draw(2, 64, 3 * 4 * 4), PLACES.expand(1, 2, -1, -1)
    if Version(transformers.__version__) < Version("5.23"):  # an axis of frames, for videos of one length
        inputs = {"pixel_values_videos": pixels, "video_position_ids": places}
    else:
        inputs = {"pixel_values_videos": pixels[0], "video_position_ids": places[0]}
        inputs["num_frames_per_video"] = torch.tensor([2])
    return [70, *frame, 71, *frame], inputs


FAMILY = Family(
    Gemma4ForConditionalGeneration,
    config,
    processor,
    "model.vision_tower",
    video=video,
    chunked_prefill=False,
    atol=6e-4,  # attention logits are not scaled down: fp32 is 3.2e-4 from float64 without any patch
)
