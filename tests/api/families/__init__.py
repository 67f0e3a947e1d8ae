"""One tiny model a family, one file each."""

from __future__ import annotations

import importlib

from families.facts import Family
from families.language import LANGUAGE

NAMES = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "vipllava",
    "video_llava",
    "gemma3",
    "gemma4",
    "llama4",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "internvl",
    "idefics3",
    "smolvlm",
    "mistral3",
    "lighton_ocr",
    "perception_lm",
    "fast_vlm",
    "aya_vision",
    "cohere2_vision",
    "kimi_k25",
    "lfm2_vl",
    "ovis2",
    "got_ocr2",
    "phi3_v",
    "phi4_multimodal",
)
FAMILIES: dict[str, Family] = {name: importlib.import_module(f"families.{name}").FAMILY for name in NAMES}
# stand for the others where a test is about calls, not about families: 1-D, M-RoPE, DeepStack, prefix-LM, windows
REPRESENTATIVE = ("llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "paligemma")

__all__ = ["FAMILIES", "LANGUAGE", "NAMES", "REPRESENTATIVE", "Family"]
