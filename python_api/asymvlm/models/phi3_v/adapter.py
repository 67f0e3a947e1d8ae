"""Phi-3.5-Vision: negative placeholders, crops and a global view an image, learned separators between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops
from asymvlm.models.pixels import square_pixels
from asymvlm.models.tower_attention import square_tower


def _layouts(model: nn.Module, inputs: Inputs) -> list[tuple[int, int]]:
    """Rows and columns of crops of each image."""
    config: Any = model.config
    size = config.vision_config.image_size
    return [(height // size, width // size) for height, width in inputs["image_sizes"].tolist()]


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    side = config.crop_side
    views = [[(h * side, w * side), (side, side)] for h, w in _layouts(model, inputs)]
    return {"image_token_id": [view for image in views for view in image]}


def _separators(model: nn.Module, inputs: Inputs, embeds: torch.Tensor) -> torch.Tensor:
    """A ``sub_GN`` ends each row of the crops and of the global view, ``glb_GN`` stands between the two."""
    config: Any = model.config
    side, vision = config.crop_side, ADAPTER.vision_mask(model, inputs["input_ids"])
    pieces = []
    for h, w in _layouts(model, inputs):
        crops = [*[False] * (w * side), True] * (h * side)
        pieces += [*crops, True, *[*[False] * side, True] * side]
    return torch.zeros_like(vision).masked_scatter(vision, torch.tensor(pieces, device=vision.device))


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    config: Any = model.config
    views = sum(1 + h * w for h, w in _layouts(model, inputs))
    return clip_tower_flops(config.vision_config, (views, *inputs["pixel_values"].shape[2:]))


def _pictures(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The global view and the crops of each image, without unused ones."""
    used = [1 + rows * columns for rows, columns in _layouts(model, inputs)]
    return torch.cat([views[:count] for views, count in zip(inputs["pixel_values"], used, strict=True)])


def _layer(model: nn.Module, depth: int) -> int:
    """The tower runs up to the layer that is read."""
    tower: Any = model.get_submodule(TOWER)
    return int(tower.depth) - 1


TOWER = "model.vision_embed_tokens.img_processor"
TOWER_TOKENS = tower_tokens.whole_view_last(_layouts)

ADAPTER = Adapter(
    model_type="phi3_v",
    unify=lambda input_ids: input_ids.clamp_min(-1),
    per_token={"labels": -100},
    views=2,
    tiling="whole last",
    grids=_grids,
    vision_flops=_vision_flops,
    protect=_separators,
    tower=TOWER,
    tower_tokens=TOWER_TOKENS,
    tower_attention=square_tower(TOWER, _layer),
    pixels=square_pixels(TOWER_TOKENS, _pictures, whole=1),
)
