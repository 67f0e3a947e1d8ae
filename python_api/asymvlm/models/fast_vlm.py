"""FastVLM: one square grid an image, from a convolutional tower that needs timm."""

from __future__ import annotations

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter
from asymvlm.models.towers import square_tiles

ADAPTER = Adapter(
    model_type="fast_vlm",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: int(config.image_seq_length)),
    tower_tokens=tower_tokens.maps,
)
