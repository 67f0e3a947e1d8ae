"""Qwen2-VL: M-RoPE positions, a grid of its own size for every image and video."""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.pixels import qwen_pixels
from asymvlm.models.tower_attention import last_block, packed_tower
from asymvlm.models.towers import qwen_flops, qwen_grids

ADAPTER = Adapter(
    model_type="qwen2_vl",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    per_token={"mm_token_type_ids": 0, "labels": -100},
    drop_when_pruned=("mm_token_type_ids",),
    mrope=True,
    grids=qwen_grids,
    vision_flops=qwen_flops,
    tower="model.visual",
    tower_tokens=tower_tokens.blocks,
    tower_attention=packed_tower("model.visual", last_block),
    pixels=qwen_pixels,
)
