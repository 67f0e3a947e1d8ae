"""Token grids and work of the vision towers that several families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from asymvlm.models.adapter import Grid, Grids, Inputs
from asymvlm.models.flops import clip_tower_flops, layer_flops

QWEN_GRIDS = {"image_token_id": "image_grid_thw", "video_token_id": "video_grid_thw"}


def square_tiles(tokens: Callable[[Any], int], pixels: str = "pixel_values") -> Callable[[nn.Module, Inputs], Grids]:
    """One square grid of ``tokens(config)`` for each picture in ``pixels`` ``(pictures, channels, height, width)``."""

    def grids(model: nn.Module, inputs: Inputs) -> Grids:
        side = math.isqrt(tokens(model.config))
        return {"image_token_id": [(side, side)] * inputs[pixels].shape[:-3].numel()}

    return grids


def square_patches(config: Any) -> int:
    """Patches of a picture of the tower's own size."""
    image, patch = (_side(getattr(config.vision_config, name)) for name in ("image_size", "patch_size"))
    return int((image // patch) ** 2)


def tower_flops(*, class_token: bool = True, pixels: tuple[str, ...] = ("pixel_values",)) -> Any:
    """The work of a CLIP or SigLIP tower over all pictures of a call."""

    def vision_flops(model: nn.Module, inputs: Inputs) -> int:
        config: Any = cast("Any", model.config).vision_config
        found = [inputs[name].shape for name in pixels if inputs.get(name) is not None]
        return sum(
            clip_tower_flops(config, (shape[:-3].numel(), *shape[-3:]), class_token=class_token) for shape in found
        )

    return vision_flops


def qwen_grids(model: nn.Module, inputs: Inputs) -> Grids:
    """Every image and video of its own size, told by the processor in patches before merging."""
    config: Any = model.config
    merge = config.vision_config.spatial_merge_size
    grids: dict[str, list[Grid]] = {}
    for token, name in QWEN_GRIDS.items():
        if inputs.get(name) is not None:
            grids[token] = [(t * h // merge, w // merge) for t, h, w in inputs[name].tolist()]
    return grids


def qwen_flops(model: nn.Module, inputs: Inputs) -> int:
    """A tower whose MLP has two matrices and whose blocks see one frame each."""
    config: Any = cast("Any", model.config).vision_config
    width = getattr(config, "embed_dim", None) or config.hidden_size
    inner = getattr(config, "intermediate_size", None) or config.mlp_ratio * width
    total = 0
    for name in QWEN_GRIDS.values():
        for t, h, w in inputs[name].tolist() if inputs.get(name) is not None else ():
            n = t * h * w
            total += config.depth * (layer_flops(n, width, inner, span=h * w) - n * width * inner)
    return total


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])
