"""LFM2-VL: tiles and a thumbnail of their own sizes; most layers are short convolutions over the kept tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grids, Inputs


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    merge = config.downsample_factor
    return {"image_token_id": [(-(-h // merge), -(-w // merge)) for h, w in inputs["spatial_shapes"].tolist()]}


ADAPTER = Adapter(
    model_type="lfm2_vl",
    drop=(*VISION_INPUTS, "spatial_shapes", "pixel_attention_mask"),
    recurrent=True,
    per_token={"labels": -100},
    grids=_grids,
    tiling="tags",
    tower_tokens=tower_tokens.padded_images,
)
