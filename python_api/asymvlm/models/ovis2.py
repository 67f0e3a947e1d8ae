"""Ovis 2: tokens are mixtures of a visual vocabulary; indicator ids around the tiles stay as text."""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_patches, square_tiles, tower_flops

ADAPTER = Adapter(
    model_type="ovis2",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: square_patches(config) // config.vision_config.hidden_stride**2),
    tiling="ovis",
    vision_flops=tower_flops(class_token=False),
    tower_tokens=tower_tokens.pictures,
)
