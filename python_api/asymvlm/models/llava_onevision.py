"""LLaVA-OneVision: LLaVA-NeXT's views and newlines for single images, one view for each of several, pooled video."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grid, Grids, Inputs
from asymvlm.models.llava_next import crops_grid, layouts, newlines, unpad_image
from asymvlm.models.tower_attention import square_tower
from asymvlm.models.towers import tower_flops

NOTHING: Grid = (0, 0)


def _shrunk(grid: Grid, side: int, most_crops: int) -> Grid:
    """Crops beyond ``anyres_max_N`` are interpolated down."""
    rows, columns = grid
    ratio = math.sqrt(rows * columns / (most_crops * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else grid


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    found: dict[str, list[Grid]] = {}
    if inputs.get("image_sizes") is not None:
        sizes, counts = inputs["image_sizes"].cpu(), inputs.get("batch_num_images")
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        most_crops = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        found["image_token_id"] = []
        for size, has_crops in zip(sizes, alone, strict=True):
            crops = _shrunk(crops_grid(config, size), side, most_crops) if has_crops else NOTHING
            found["image_token_id"] += [(side, side), crops]
    if inputs.get("pixel_values_videos") is not None:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        pooled = math.ceil(side / 2)
        found["video_token_id"] = [(frames * pooled, pooled), NOTHING] * videos
    return found


ADAPTER = Adapter(
    model_type="llava_onevision",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    drop=(*VISION_INPUTS, "image_sizes_videos", "vision_aspect_ratio", "batch_num_images"),
    per_token={"token_type_ids": 0, "labels": -100},
    views=2,
    tiling="whole first",
    grids=_grids,
    vision_flops=tower_flops(class_token=False, pixels=("pixel_values", "pixel_values_videos")),
    protect=newlines,
    tower_tokens=tower_tokens.whole_view_first(layouts, unpad_image),
    tower_attention=square_tower("model.vision_tower"),
)
