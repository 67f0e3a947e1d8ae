"""Qwen2.5-VL: M-RoPE positions, a grid of its own size for every image and video, a windowed vision tower."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.models.flops import layer_flops
from asymvlm.models.pixels import qwen_pixels
from asymvlm.models.tower_attention import last_full_block, packed_tower
from asymvlm.models.towers import QWEN_GRIDS, qwen_grids


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    """Full-attention blocks see a frame, the others a window."""
    config: Any = cast("Any", model.config).vision_config
    window = (config.window_size // config.patch_size) ** 2
    total = 0
    for name in QWEN_GRIDS.values():
        if inputs.get(name) is None:
            continue
        for t, h, w in inputs[name].tolist():
            for layer in range(config.depth):
                span = h * w if layer in config.fullatt_block_indexes else min(window, h * w)
                total += layer_flops(t * h * w, config.hidden_size, config.intermediate_size, span=span)
    return total


ADAPTER = Adapter(
    model_type="qwen2_5_vl",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    per_token={"mm_token_type_ids": 0, "labels": -100},
    drop_when_pruned=("mm_token_type_ids",),
    mrope=True,
    grids=qwen_grids,
    vision_flops=_vision_flops,
    tower="model.visual",
    tower_tokens=tower_tokens.windowed_blocks,
    tower_attention=packed_tower("model.visual", last_full_block),
    pixels=qwen_pixels,
)
