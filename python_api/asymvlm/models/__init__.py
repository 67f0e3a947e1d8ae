"""The families the library knows, by ``config.model_type``, and language models. Third parties add by an entry point.

An entry point of the group ``asymvlm.adapters`` names the ``model_type`` and points at an `Adapter`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from torch import nn

from asymvlm.models import (
    aya_vision,
    cohere2_vision,
    fast_vlm,
    gemma3,
    gemma4,
    glm4v,
    glm4v_moe,
    glm46v,
    got_ocr2,
    idefics3,
    internvl,
    kimi_k25,
    lfm2_vl,
    lighton_ocr,
    llama4,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    mistral3,
    ovis2,
    paligemma,
    perception_lm,
    phi3_v,
    phi4_multimodal,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
    video_llava,
    vipllava,
)
from asymvlm.models.adapter import Adapter
from asymvlm.models.language import language_adapter

ENTRY_POINT_GROUP = "asymvlm.adapters"
FAMILIES = (
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    vipllava,
    video_llava,
    gemma3,
    gemma4,
    llama4,
    paligemma,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
    qwen3_5,
    qwen3_5_moe,
    glm4v,
    glm4v_moe,
    glm46v,
    internvl,
    idefics3,
    smolvlm,
    mistral3,
    lighton_ocr,
    perception_lm,
    fast_vlm,
    aya_vision,
    cohere2_vision,
    kimi_k25,
    lfm2_vl,
    ovis2,
    got_ocr2,
    phi3_v,
    phi4_multimodal,
)
_ADAPTERS = {module.ADAPTER.model_type: module.ADAPTER for module in FAMILIES}


def supported_models() -> list[str]:
    """The ``config.model_type`` of every family whose vision `asymvlm.patch` prunes, third-party ones included.

    Beside them it takes causal language models of transformers without vision, for ``text=`` and ``cache=``.
    """
    return sorted({*_ADAPTERS, *entry_points(group=ENTRY_POINT_GROUP).names})


def registered(model_type: str | None) -> Adapter | None:
    """The adapter of a ``config.model_type``; None if nobody has one."""
    if model_type in _ADAPTERS:
        return _ADAPTERS[model_type]
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == model_type:
            adapter: Adapter = entry.load()
            return adapter
    return None


def adapter_for(model: nn.Module, *, vision: bool = True) -> Adapter:
    """The adapter of a model.

    Args:
        vision: False takes causal language models too, which have none.
    Raises:
        ValueError: if its ``config.model_type`` is unknown, and the message lists the known ones; if it has no vision.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    adapter = registered(model_type)
    if adapter is not None:
        return adapter
    language = language_adapter(model)
    if language is None:
        raise ValueError(
            f"no adapter for {type(model).__name__} with model_type {model_type!r}; known: "
            f"{', '.join(supported_models())}; and, for text eviction and cache limits, causal language models"
        )
    if vision:
        raise ValueError(
            f"{type(model).__name__} is a language model, without vision to prune: asymvlm.patch takes it with "
            "text=TextEviction(...) or cache=CacheLimit(...) and without vision settings or a strategy"
        )
    return language
