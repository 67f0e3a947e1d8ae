"""Gemma 4: images of their own sizes, sliding windows, and in some sizes a second embedding for every decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asymvlm.models.adapter import VISION_INPUTS, Adapter, Grids, Inputs


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    config: Any = model.config
    if inputs.get("image_position_ids") is None:
        return {}
    places = inputs["image_position_ids"].amax(1) + 1  # (images, 2): columns and rows of patches
    pooled = (places // config.vision_config.pooling_kernel_size).tolist()
    return {"image_token_id": [(rows, columns) for columns, rows in pooled]}


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
)
