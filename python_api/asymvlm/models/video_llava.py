"""Video-LLaVA: one square grid an image; a video has its own id, and a class token before the grid of each frame."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers.models.video_llava.modeling_video_llava import VideoLlavaModel

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grid, Grids, Inputs
from asymvlm.models.towers import square_patches, tower_flops

# transformers renamed it after 5.17
IMAGES = (
    "pixel_values" if "pixel_values" in inspect.signature(VideoLlavaModel.forward).parameters else "pixel_values_images"
)


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    side, found = math.isqrt(square_patches(model.config)), dict[str, list[Grid]]()
    if inputs.get(IMAGES) is not None:
        found["image_token_id"] = [(side, side)] * len(inputs[IMAGES])
    if inputs.get("pixel_values_videos") is not None:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        found["video_token_id"] = [(frames * side, side)] * videos
    return found


def _class_tokens(model: nn.Module, inputs: Inputs, embeds: torch.Tensor) -> torch.Tensor:
    """The first token of every frame."""
    config: Any = model.config
    video = inputs["input_ids"] == config.video_token_id
    place = video.flatten().cumsum(0).view_as(video) - 1
    return video & (place % (square_patches(config) + 1) == 0)


ADAPTER = Adapter(
    model_type="video_llava",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=(IMAGES, "pixel_values_videos"),
    drop=(*VISION_INPUTS, "pixel_values_images"),
    per_token={"labels": -100},
    grids=_grids,
    vision_flops=tower_flops(pixels=(IMAGES, "pixel_values_videos")),
    protect=_class_tokens,
    tower="model.image_tower",
    tower_tokens=tower_tokens.pictures,
)
