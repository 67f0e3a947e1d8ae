"""Aya Vision: square tiles, merged two by two; a decoder with sliding windows."""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_patches, square_tiles, tower_flops

ADAPTER = Adapter(
    model_type="aya_vision",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: square_patches(config) // config.downsample_factor**2),
    tiling="canvas",
    vision_flops=tower_flops(class_token=False),
    tower_tokens=tower_tokens.pictures,
)
