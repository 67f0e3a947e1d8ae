"""LLaVA-NeXT: a whole view, then crops put together without their padding, a learned newline at the end of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grid, Grids, Inputs
from asymvlm.models.pixels import square_pixels
from asymvlm.models.tower_attention import square_tower
from asymvlm.models.towers import tower_flops


def newlines(model: nn.Module, inputs: Inputs, embeds: torch.Tensor) -> torch.Tensor:
    """``(B, S)`` bool: rows that are the model's learned newline."""
    composite: Any = model.get_submodule("model")
    return (embeds == composite.image_newline.detach().to(embeds)).all(-1)


def crops_grid(config: Any, image_size: torch.Tensor) -> Grid:
    """Rows and columns of the crops of one image, padding and newlines left out."""
    tower = config.vision_config
    rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, tower.image_size)
    side = tower.image_size // tower.patch_size
    height, width = unpad_image(torch.empty(1, rows * side, columns * side), image_size).shape[1:]
    return height, width


def layouts(model: nn.Module, inputs: Inputs) -> list[tuple[int, int]]:
    """Rows and columns of crops of each image."""
    config: Any = model.config
    points, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [get_anyres_image_grid_shape(size, points, side) for size in inputs["image_sizes"].cpu()]


def grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    views = [[(side, side), crops_grid(config, size)] for size in inputs["image_sizes"].cpu()]
    return {"image_token_id": [view for image in views for view in image]}


def _pictures(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The whole view and the crops of each image, less those that fill it up to the most of any."""
    if inputs["pixel_values"].ndim == 4:  # one after another already
        return inputs["pixel_values"]
    used = [1 + rows * columns for rows, columns in layouts(model, inputs)]
    return torch.cat([views[:count] for views, count in zip(inputs["pixel_values"], used, strict=True)])


TOWER_TOKENS = tower_tokens.whole_view_first(layouts, unpad_image)

ADAPTER = Adapter(
    model_type="llava_next",
    per_token={"token_type_ids": 0, "labels": -100},
    views=2,
    tiling="whole first",
    grids=grids,
    vision_flops=tower_flops(),
    protect=newlines,
    tower_tokens=TOWER_TOKENS,
    projector="model.multi_modal_projector",
    tower_attention=square_tower("model.vision_tower"),
    pixels=square_pixels(TOWER_TOKENS, _pictures),
)
