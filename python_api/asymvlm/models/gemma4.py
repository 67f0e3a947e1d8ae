"""Gemma 4: images of their own sizes, sliding windows, and in some sizes a second embedding for every decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grid, Grids, Inputs


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    found: dict[str, list[Grid]] = {}
    if inputs.get("image_position_ids") is not None:
        found["image_token_id"] = _pooled(model, inputs["image_position_ids"])
    places = inputs.get("video_position_ids")
    if places is None:
        return found
    # frames of all videos in a row, or an axis of their own (transformers < 5.23)
    counts = [places.shape[1]] * len(places) if places.ndim == 4 else inputs["num_frames_per_video"].tolist()
    frames = iter(_pooled(model, places.flatten(0, -3)))
    found["video_token_id"] = []
    for count in counts:
        sizes = [next(frames) for _ in range(count)]  # frames of a video have one size
        found["video_token_id"].append((sum(rows for rows, _ in sizes), sizes[0][1]))
    return found


def _pooled(model: nn.Module, places: torch.Tensor) -> list[Grid]:
    """Rows and columns of tokens of each picture, from its patches' ``(columns, rows)``, -1 where padded."""
    config: Any = model.config
    pooled = ((places.amax(1) + 1) // config.vision_config.pooling_kernel_size).tolist()
    return [(rows, columns) for columns, rows in pooled]


def _per_layer_rows(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor | None:
    config: Any = model.config
    if not config.get_text_config().hidden_size_per_layer_input:
        return None
    text: Any = model.get_submodule("model.language_model")
    rows: torch.Tensor = text.get_per_layer_inputs(input_ids, None)
    return rows


ADAPTER = Adapter(
    model_type="gemma4",
    vision_ids=("image_token_id", "video_token_id"),
    triggers=("pixel_values", "pixel_values_videos"),
    drop=(
        *VISION_INPUTS,
        "image_position_ids",
        "video_position_ids",
        "num_frames_per_video",
        "input_features",
        "input_features_mask",
    ),
    per_token={"mm_token_type_ids": 0, "labels": -100},
    grids=_grids,
    decoder_rows={"per_layer_inputs": _per_layer_rows},
    tower_tokens=tower_tokens.blocks,
)
