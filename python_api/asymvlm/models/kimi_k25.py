"""Kimi K2.5: images and videos of their own sizes, one-dimensional positions, latent attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.models.towers import QWEN_GRIDS


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    """Frames of a video are averaged, so it has the tokens of one."""
    config: Any = model.config
    rows, columns = config.vision_config.merge_kernel_size
    return {
        token: [(h // rows, w // columns) for _, h, w in inputs[name].tolist()]
        for token, name in QWEN_GRIDS.items()
        if inputs.get(name) is not None
    }


ADAPTER = Adapter(
    model_type="kimi_k25",
    latent_keys=True,
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    per_token={"labels": -100},
    grids=_grids,
    tower_tokens=tower_tokens.joined_images,
)
