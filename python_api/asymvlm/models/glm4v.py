"""GLM-4V: Qwen2-VL's inputs; the frames of a video are runs of the image's own placeholder, so it comes alone."""

from __future__ import annotations

import dataclasses

from torch import nn

from asymvlm.models import qwen2_vl
from asymvlm.models.adapter import Grids, Inputs
from asymvlm.models.towers import qwen_grids


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    """One for each image, and for each frame: tokens between frames part them."""
    found = dict(qwen_grids(model, inputs))
    for t, grid in zip(_frames(inputs), found.pop("video_token_id", []), strict=True):
        rows, columns = grid
        found["image_token_id"] = [*found.get("image_token_id", []), *[(rows // t, columns)] * t]
    return found


def _frames(inputs: Inputs) -> list[int]:
    return inputs["video_grid_thw"][:, 0].tolist() if inputs.get("video_grid_thw") is not None else []


ADAPTER = dataclasses.replace(qwen2_vl.ADAPTER, model_type="glm4v", grids=_grids)
