"""Gemma 3: bidirectional image blocks from ``token_type_ids``, pooled to a fixed number of tokens an image."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops
from asymvlm.models.pixels import square_pixels
from asymvlm.models.tower_attention import square_tower


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    side = math.isqrt(config.mm_tokens_per_image)
    return {"image_token_id": [(side, side)] * inputs["pixel_values"].shape[0]}


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    config: Any = model.config
    return clip_tower_flops(config.vision_config, inputs["pixel_values"].shape, class_token=False)


ADAPTER = Adapter(
    model_type="gemma3",
    per_token={"token_type_ids": 0, "labels": -100},
    grids=_grids,
    tiling="unknown",  # pan and scan
    vision_flops=_vision_flops,
    tower_tokens=tower_tokens.pictures,
    tower_attention=square_tower("model.vision_tower"),
    pixels=square_pixels(tower_tokens.pictures),
)
