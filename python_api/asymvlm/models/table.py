"""The table of families that README and tests read: what each is called, and what is particular to it."""

from __future__ import annotations

from collections.abc import Iterator

from asymvlm.models import FAMILIES

# model_type -> (name, what is particular); the rest of a row is read from the adapter
FACTS: dict[str, tuple[str, str]] = {
    "llava": ("LLaVA 1.5", ""),
    "llava_next": ("LLaVA-NeXT", "newlines kept"),
    "llava_next_video": ("LLaVA-NeXT-Video", "newlines kept"),
    "llava_onevision": ("LLaVA-OneVision", "newlines kept"),
    "vipllava": ("ViP-LLaVA", ""),
    "video_llava": ("Video-LLaVA", "class tokens of frames kept"),
    "gemma3": ("Gemma 3", "images attend both ways; sliding windows by original position"),
    "gemma4": ("Gemma 4", "images may attend both ways; sliding windows by original position"),
    "llama4": (
        "Llama 4",
        "chunks by original position; a temperature by index beyond 8192 tokens; fails in transformers 5.24.0 itself",
    ),
    "paligemma": ("PaliGemma 1, 2", "the prompt attends both ways; positions from 1; no prefill in chunks"),
    "qwen2_vl": ("Qwen2-VL", ""),
    "qwen2_5_vl": ("Qwen2.5-VL", ""),
    "qwen3_vl": ("Qwen3-VL", "DeepStack; not `prune_inputs`"),
    "qwen3_vl_moe": ("Qwen3-VL, experts", "DeepStack; not `prune_inputs`"),
    "qwen3_5": ("Qwen3.5", "recurrent layers see the kept tokens only"),
    "qwen3_5_moe": ("Qwen3.5, experts", "recurrent layers see the kept tokens only"),
    "glm4v": ("GLM-4.1V", "images or a video, not both"),
    "glm4v_moe": ("GLM-4.5V", "images or a video, not both"),
    "glm46v": ("GLM-4.6V", "images or a video, not both"),
    "internvl": ("InternVL 3", "video frames are images"),
    "idefics3": ("Idefics 3", ""),
    "smolvlm": ("SmolVLM", "video frames are images"),
    "mistral3": ("Mistral Small 3.1", "row ends are text"),
    "lighton_ocr": ("LightOnOCR", ""),
    "perception_lm": ("Perception LM", "tested with another tower than timm's"),
    "fast_vlm": ("FastVLM", "tested with another tower than timm's"),
    "aya_vision": ("Aya Vision", "sliding windows by original position"),
    "cohere2_vision": ("Command A Vision", "sliding windows by original position"),
    "kimi_k25": ("Kimi K2.5", "video fails in transformers itself"),
    "lfm2_vl": ("LFM2-VL", "convolutions see the kept tokens only"),
    "ovis2": ("Ovis 2", "indicators are text"),
    "got_ocr2": ("GOT-OCR 2", "eager attention only, as without pruning"),
    "phi3_v": ("Phi-3.5-Vision", "code of our own; separators kept"),
    "phi4_multimodal": ("Phi-4-multimodal", "separators kept; audio counts as text"),
}
HEADER = ("family", "`model_type`", "inputs", "positions", "particular")


def rows() -> Iterator[tuple[str, ...]]:
    """One row a family, in the order of `asymvlm.models.FAMILIES`."""
    for module in FAMILIES:
        adapter = module.ADAPTER
        name, particular = FACTS[adapter.model_type]
        has_video = "video_token_id" in adapter.vision_ids and "video fails" not in particular
        inputs = "images, video" if has_video else "images"
        yield name, f"`{adapter.model_type}`", inputs, "M-RoPE" if adapter.mrope else "1-D", particular


def markdown() -> str:
    """The table in Markdown, without a line break at its end."""
    lines = (HEADER, ("---",) * len(HEADER), *rows())
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)
