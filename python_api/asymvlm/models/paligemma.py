"""PaliGemma: the prompt attends both ways (``token_type_ids`` 0), positions count from 1."""

from __future__ import annotations

from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_patches, square_tiles, tower_flops

ADAPTER = Adapter(
    model_type="paligemma",
    per_token={"token_type_ids": 0, "labels": -100},
    first_position=1,
    grids=square_tiles(square_patches),
    vision_flops=tower_flops(class_token=False),
)
