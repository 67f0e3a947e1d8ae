"""LLaVA 1.5: one square grid an image, plain causal attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops
from asymvlm.models.pixels import square_pixels
from asymvlm.models.tower_attention import square_tower


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    patch = config.vision_config.patch_size
    images, _, height, width = inputs["pixel_values"].shape
    return {"image_token_id": [(height // patch, width // patch)] * images}


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    config: Any = model.config
    return clip_tower_flops(config.vision_config, inputs["pixel_values"].shape)


ADAPTER = Adapter(
    model_type="llava",
    per_token={"token_type_ids": 0, "labels": -100},
    grids=_grids,
    vision_flops=_vision_flops,
    tower_tokens=tower_tokens.pictures,
    projector="model.multi_modal_projector",
    tower_attention=square_tower("model.vision_tower"),
    pixels=square_pixels(tower_tokens.pictures),
)
