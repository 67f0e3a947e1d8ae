from __future__ import annotations

import dataclasses
import inspect

from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from families.facts import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, VISION, Family, Images

DECODER = dict(
    num_hidden_layers=4,
    no_rope_layers=[1, 1, 1, 0],  # the last attends to all, without rotation
    intermediate_size_mlp=64,
    num_local_experts=4,
    interleave_moe_layer_step=2,
    attention_chunk_size=256,
)


def config(text: dict) -> Llama4Config:
    return Llama4Config(
        text_config={**text, **DECODER, **{key: text[key] for key in text if key not in TEXT}},
        vision_config={
            **VISION,
            "image_size": 32,
            "intermediate_size": 64,  # four patches of 16 in one
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        boi_token_index=BEGIN_IMAGE,
        eoi_token_index=END_IMAGE,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def processor(input_ids: Tensor, images: Images) -> dict[str, Tensor]:
    return {"pixel_values": images.draw(3, 32, 32)}


# transformers 5.24.0 reads a field of its own decoder's output that is not there; see test_models for the proof
ANSWERS = "image_outputs" not in inspect.getsource(Llama4ForConditionalGeneration.forward) or any(
    field.name == "image_outputs" for field in dataclasses.fields(MoeCausalLMOutputWithPast)
)
FAMILY = Family(
    Llama4ForConditionalGeneration,
    config,
    processor,
    "vision_model",
    broken="" if ANSWERS else "its decoder's output has no image_outputs",
)
