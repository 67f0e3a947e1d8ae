"""Mistral 3: images of their own sizes; the row ends between their tokens are text ids."""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.models.flops import layer_flops


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    step = config.vision_config.patch_size * config.spatial_merge_size
    return {"image_token_id": [(height // step, width // step) for height, width in inputs["image_sizes"].tolist()]}


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    """A gated MLP; the patches of one image see each other."""
    config: Any = model.config
    tower = config.vision_config
    patches = [(h // tower.patch_size) * (w // tower.patch_size) for h, w in inputs["image_sizes"].tolist()]
    return sum(tower.num_hidden_layers * layer_flops(n, tower.hidden_size, tower.intermediate_size) for n in patches)


ADAPTER = Adapter(
    model_type="mistral3",
    per_token={"labels": -100},
    grids=_grids,
    vision_flops=_vision_flops,
)
