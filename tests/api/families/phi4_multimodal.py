from __future__ import annotations

import torch
from torch import Tensor
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from families.facts import AUDIO, IMAGE, VISION, Family, Images

AUDIO_TOWER = dict(
    hidden_size=16,
    intermediate_size=16,
    num_blocks=1,
    num_attention_heads=2,
    ext_pw_out_channel=16,
    depthwise_separable_out_channel=16,
    input_size=16,
    nemo_conv_channels=4,
    audio_token_id=AUDIO,
    feature_layer=-2,
)


def config(text: dict) -> Phi4MultimodalConfig:
    return Phi4MultimodalConfig(
        vision_config={"image_size": 16, "crop_size": 16, "image_token_id": IMAGE, **VISION},
        audio_config=AUDIO_TOWER,
        original_max_position_embeddings=512,
        **{name: value for name, value in text.items() if name != "head_dim"},
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    """A whole view and three crops in a row, 2x2 tokens each."""
    return {
        "image_pixel_values": images.draw(4, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 48]] * len(images)),
        "image_attention_mask": torch.ones(len(images), 4, 4, 4),
    }


FAMILY = Family(
    Phi4MultimodalForCausalLM,
    config,
    processor,
    "model.embed_tokens_extend.image_embed.img_processor",
    image=(IMAGE,) * (2 * 7 + 1 + 2 * 3),
    separators=frozenset({6, 13, 14, 17, 20}),  # row ends, and the one between crops and whole view
    pixels="image_pixel_values",
    wrong_without_patch={
        "test_eager_attention_answers_as_sdpa": "the features of its tower differ by 1 between the two"
    },
    seed=5,
)
