"""Perception LM: pooled square tiles and video frames; its tower needs timm."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Grid, Grids, Inputs

KINDS = {"image_token_id": "pixel_values", "video_token_id": "pixel_values_videos"}


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    """Of every tile; the frames of a video are one grid."""
    config: Any = model.config
    tower: Any = model.get_submodule("model.vision_tower")
    found: dict[str, list[Grid]] = {}
    for token, name in KINDS.items():
        if inputs.get(name) is None:
            continue
        rows, tiles, _, height, width = inputs[name].shape
        patch = _patch(tower)
        if patch is None:
            return {}
        side = math.isqrt((height // patch) * (width // patch)) // config.projector_pooling_ratio
        found[token] = [(side, side)] * (rows * tiles) if token == "image_token_id" else [(tiles * side, side)] * rows
    return found


def _patch(tower: Any) -> int | None:
    """Side of a patch in pixels, of timm's towers and of transformers' own."""
    embedder = getattr(getattr(tower, "timm_model", None), "patch_embed", None)
    size = getattr(tower.config, "patch_size", None) if embedder is None else embedder.patch_size
    return size if size is None or isinstance(size, int) else int(size[0])


ADAPTER = Adapter(
    model_type="perception_lm",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    per_token={"labels": -100},
    grids=_grids,
    tiling="unknown",
    tower_tokens=tower_tokens.pictures,
)
