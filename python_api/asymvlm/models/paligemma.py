"""PaliGemma: the prompt attends both ways (``token_type_ids`` 0), positions count from 1.

In PaliGemma 2 that holds beyond the windows of its sliding layers too; answers see the window by original position.
"""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.pixels import square_pixels
from asymvlm.models.tower_attention import square_tower
from asymvlm.models.towers import square_patches, square_tiles, tower_flops

ADAPTER = Adapter(
    model_type="paligemma",
    needs_fresh_cache=True,
    per_token={"token_type_ids": 0, "labels": -100},
    first_position=1,
    open_prompt=True,
    grids=square_tiles(square_patches),
    vision_flops=tower_flops(class_token=False),
    tower_tokens=tower_tokens.pictures,
    tower_attention=square_tower("model.vision_tower"),
    pixels=square_pixels(tower_tokens.pictures),
)
