"""Causal language models without vision: nothing to prune, generated text and cached tokens to evict.

Not a family, but what they have in common: a decoder that takes ids, and a head on it. Whether eviction understands the
decoder's layers is for the cache and the layers to say.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models.adapter import Adapter


def language_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of a causal language model of transformers, or of a subclass of one; None for any other model.

    A model with a tower, or whose configuration has parts beside the decoder's, is not one.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = getattr(model, "config", None)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config is None or not known & {base.__name__ for base in type(model).__mro__}:
        return None
    alone = not getattr(config, "sub_configs", None) and config.get_text_config(decoder=True) is config
    if not alone or config.is_encoder_decoder or getattr(config, "cross_attention_layers", None):
        return None
    text = _decoder_path(model)
    return (
        None
        if text is None
        else Adapter(
            model_type=config.model_type,
            composite="",
            text=text,
            vision_ids=(),
            triggers=(),
            per_token={"token_type_ids": 0, "labels": -100},
        )
    )


def _decoder_path(model: nn.Module) -> str | None:
    """Where `get_decoder` leads, if all layers that the configuration counts are there; None if not."""
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != whole.config.num_hidden_layers:
        return None
    return next((name for name, module in model.named_modules() if module is decoder), None)


__all__ = ["language_adapter"]
