"""Phi-4-multimodal: one module merges and decodes; crops, then a whole view, with learned separators between rows.

Audio tokens are merged too and stay: they are text to the scores, as a spoken question is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from asymvlm.models.adapter import Adapter, Grid, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops

IMAGE_ID = "vision_config.image_token_id"
IMAGE_INPUTS = ("image_pixel_values", "image_sizes", "image_attention_mask")
AUDIO_INPUTS = ("audio_input_features", "audio_embed_sizes", "audio_attention_mask")


def _merge(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    composite: Any = model.get_submodule("model")
    features = {name: inputs.get(name) for name in (*IMAGE_INPUTS, *AUDIO_INPUTS)}
    embeds = composite.embed_tokens(inputs["input_ids"])
    return {"inputs_embeds": composite.embed_tokens_extend(inputs["input_ids"], embeds, **features)}


def _views(model: nn.Module, inputs: Inputs) -> list[tuple[Grid, Grid]]:
    """Tokens of the crops, less their padding, and of the whole view, for each image."""
    tower: Any = model.config.vision_config  # type: ignore[union-attr]
    side = math.ceil(tower.image_size // tower.patch_size / 2)
    views = []
    for size, mask in zip(inputs["image_sizes"].view(-1, 2).tolist(), inputs["image_attention_mask"], strict=True):
        rows, columns = (length // tower.crop_size for length in size)
        crops = mask[1 : rows * columns + 1, ::2, ::2].view(rows, columns, side, side)
        used = crops.transpose(1, 2).reshape(rows * side, columns * side)
        views.append(((int(used[:, 0].sum()), int(used[0].sum())), (side, side)))
    return views


def _grids(model: nn.Module, inputs: Inputs) -> Grids:
    return {IMAGE_ID: [view for image in _views(model, inputs) for view in image]}


def _separators(model: nn.Module, inputs: Inputs, embeds: torch.Tensor) -> torch.Tensor:
    """One ends each row of the crops and of the whole view, one stands between the two."""
    pieces: list[bool] = []
    for crops, whole in _views(model, inputs):
        for (rows, columns), behind in ((crops, [True]), (whole, [])):
            pieces += [*[False] * columns, True] * rows + behind
    ids = inputs["input_ids"]
    image = ids == model.config.vision_config.image_token_id  # type: ignore[union-attr]
    return torch.zeros_like(image).masked_scatter(image, torch.tensor(pieces, device=ids.device))


def _vision_flops(model: nn.Module, inputs: Inputs) -> int:
    config: Any = model.config
    shape = inputs["image_pixel_values"].shape
    return clip_tower_flops(config.vision_config, (shape[:-3].numel(), *shape[-3:]), class_token=False)


ADAPTER = Adapter(
    model_type="phi4_multimodal",
    text="",
    vision_ids=(IMAGE_ID,),
    triggers=("image_pixel_values",),
    drop=(*IMAGE_INPUTS, *AUDIO_INPUTS),
    per_token={"labels": -100},
    views=2,
    tiling="whole last",
    grids=_grids,
    vision_flops=_vision_flops,
    protect=_separators,
    merge=_merge,
)
