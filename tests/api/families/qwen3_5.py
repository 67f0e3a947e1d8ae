from __future__ import annotations

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from families.facts import MROPE, Family
from families.qwen2_5_vl import IDS, processor
from families.qwen3_vl import TOWER, video

KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
LINEAR = dict(
    num_hidden_layers=len(KINDS),
    layer_types=KINDS,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
ROPE = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}


def tower(text: dict) -> dict:
    rest = {name: value for name, value in TOWER.items() if name != "deepstack_visual_indexes"}
    return {**rest, "out_hidden_size": text["hidden_size"]}


def config(text: dict) -> Qwen3_5Config:
    return Qwen3_5Config(
        text_config={"rope_parameters": ROPE, **text, **LINEAR},
        vision_config=tower(text),
        **IDS,
    )


FAMILY = Family(
    Qwen3_5ForConditionalGeneration,
    config,
    processor,
    "model.visual",
    video=video,
    mrope=True,
    bare_images=False,
    norm_offset=1.0,
    recurrent=("linear_attn",),
    seed=6,
    atol=3e-5,  # fp32: chunks of the delta rule differ by 2e-5 from its single steps, without any patch
)
