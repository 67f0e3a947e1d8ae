"""LLaVA-NeXT-Video: LLaVA-NeXT's images, and videos of pooled square frames without newlines."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from asymvlm.models import llava_next
from asymvlm.models.adapter import Grid, Grids, Inputs
from asymvlm.models.towers import tower_flops

NOTHING: Grid = (0, 0)


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    found = dict(llava_next.grids(model, inputs)) if inputs.get("image_sizes") is not None else {}
    if inputs.get("pixel_values_videos") is not None:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        found["video_token_id"] = [(frames * side, side), NOTHING] * videos
    return found


ADAPTER = dataclasses.replace(
    llava_next.ADAPTER,
    model_type="llava_next_video",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    grids=_grids,
    projector=None,  # frames are pooled in front of it
    vision_flops=tower_flops(pixels=("pixel_values", "pixel_values_videos")),
)
