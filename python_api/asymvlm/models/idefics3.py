"""Idefics 3: tiles with row and column tags between them as text, all-zero padding tiles in ``pixel_values``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops
from asymvlm.models.towers import square_patches


def _tiles(inputs: Inputs) -> int:
    pixels: torch.Tensor = inputs["pixel_values"]  # (B, tiles, channels, height, width)
    return int((pixels != 0).flatten(2).any(-1).sum())


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    side = int(square_patches(config) ** 0.5) // config.scale_factor
    return {"image_token_id": [(side, side)] * _tiles(inputs)}


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    config: Any = model.config
    shape = (_tiles(inputs), *inputs["pixel_values"].shape[2:])
    return clip_tower_flops(config.vision_config, shape, class_token=False)


ADAPTER = Adapter(
    model_type="idefics3",
    text="text_model",
    drop=(*VISION_INPUTS, "pixel_attention_mask", "image_hidden_states"),
    per_token={"labels": -100},
    grids=_grids,
    tiling="tags",
    vision_flops=_vision_flops,
)
