"""Heads of attention as a configuration tells them, layer by layer where they differ."""

from __future__ import annotations

from typing import Any


def attention_heads(text: Any) -> set[tuple[int, int, int]]:
    """Query heads, K/V heads and width of a head, of every kind of layer. ``text``: a decoder's configuration."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return {kind for layer in layers for kind in _of_layer(layer)}


def _of_layer(layer: Any) -> set[tuple[int, int, int]]:
    H = layer.num_attention_heads
    if nope := getattr(layer, "qk_nope_head_dim", None):  # latent attention caches whole heads, of keys and of values
        return {(H, H, nope + layer.qk_rope_head_dim), (H, H, layer.v_head_dim)}
    G = getattr(layer, "num_key_value_heads", None) or H
    D = getattr(layer, "head_dim", None) or layer.hidden_size // H
    # Gemma 4 before transformers 5.24: beside those of its sliding layers
    wide, few = getattr(layer, "global_head_dim", None), getattr(layer, "num_global_key_value_heads", None)
    return {(H, G, D)} | ({(H, few or G, wide or D)} if wide or few else set())
