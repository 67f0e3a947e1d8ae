"""Tiny causal language models without vision, by ``config.model_type``: no families of ours, so not in the matrix."""

from __future__ import annotations

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from families.facts import TEXT, Family


def _family(model: type[PreTrainedModel], config: type[PreTrainedConfig], **facts: object) -> Family:
    norm_offset = facts.pop("norm_offset", 0.0)

    def make(text: dict[str, object]) -> PreTrainedConfig:
        asked = {key: value for key, value in text.items() if key not in TEXT}
        return config(**{**text, **facts, **asked})

    return Family(model, make, lambda ids, images: {}, "", norm_offset=norm_offset)


KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
LANGUAGE = {
    "llama": _family(LlamaForCausalLM, LlamaConfig),
    "qwen2": _family(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": _family(Qwen3ForCausalLM, Qwen3Config),
    "gemma3_text": _family(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        layer_types=KINDS,
        sliding_window=20,
        query_pre_attn_scalar=8,
        norm_offset=1.0,
    ),
    "phi3": _family(Phi3ForCausalLM, Phi3Config),
    "mistral": _family(MistralForCausalLM, MistralConfig, sliding_window=None),
    "opt": _family(OPTForCausalLM, OPTConfig, ffn_dim=64, word_embed_proj_dim=32, num_key_value_heads=None),
}
