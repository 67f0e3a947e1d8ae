"""InternVL: every tile, thumbnail and video frame is a square grid under one placeholder."""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_tiles, tower_flops

ADAPTER = Adapter(
    model_type="internvl",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: int(config.image_seq_length)),
    tiling="canvas",
    vision_flops=tower_flops(),
    tower_tokens=tower_tokens.pictures,
)
