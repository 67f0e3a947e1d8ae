"""The pixels that a vision token is made from, as numbers that are equal where all pixels are.

A method that drops repeated patches asks one thing of pixels: are they the same? So patches are numbered, equal ones
alike, and a token is the tuple of the numbers of its patches, in their order within it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from asymvlm.models.adapter import Grid, Inputs
from asymvlm.models.tower_tokens import TowerTokens
from asymvlm.models.towers import QWEN_GRIDS

PixelNumbers = Callable[[nn.Module, Inputs, Sequence[Grid]], torch.Tensor]


def numbered(patches: torch.Tensor) -> torch.Tensor:
    """``(..., width)`` -> ``(...)`` int64: equal for equal rows of the call. A NaN equals nothing. Synchronises."""
    return torch.unique(patches.flatten(0, -2), dim=0, return_inverse=True)[1].view(patches.shape[:-1])


def one_after_another(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Pictures as they lie in ``pixel_values``, ``(..., channels, height, width)``."""
    return inputs["pixel_values"].flatten(0, -4)


def square_pixels(
    tokens: TowerTokens,
    pictures: Callable[[nn.Module, Inputs], torch.Tensor] = one_after_another,
    whole: int = 0,
) -> PixelNumbers:
    """Of a tower over square pictures.

    Args:
        tokens: the family's way from patches to tokens. pictures: those the tower sees, ``(P, channels, H, W)``.
        whole: which grid is that of one whole picture.
    Returns:
        A function of ``(model, inputs, grids)`` to ``(tokens, patches of a token)`` int64.
    """

    def numbers(model: nn.Module, inputs: Inputs, grids: Sequence[Grid]) -> torch.Tensor:
        config: Any = model.config
        size, seen = config.vision_config.patch_size, pictures(model, inputs)
        cut = seen.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (P, channels, rows, size, columns, size)
        patches = numbered(cut.permute(0, 2, 4, 1, 3, 5).flatten(3))  # (P, rows, columns)
        block = patches.shape[1] // grids[whole][0]
        row, column = (torch.arange(side, device=seen.device) % block for side in patches.shape[1:])
        place = nn.functional.one_hot(row[:, None] * block + column, block**2)
        # the mean over a token's patches then keeps each number in a place of its own
        apart = (place * patches[..., None]).flatten(1, 2).double()
        return (tokens(model, inputs, apart, grids) * block**2).round().long()

    return numbers


def qwen_pixels(model: nn.Module, inputs: Inputs, grids: Sequence[Grid]) -> torch.Tensor:
    """Of Qwen's processors, whose patches lie in the order of the tokens: ``(tokens, patches of a token)`` int64."""
    pixels = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
    found = [inputs[pixels[name]] for name in QWEN_GRIDS.values() if inputs.get(name) is not None]
    tokens = sum(rows * columns for rows, columns in grids)
    return numbered(torch.cat(found)).unflatten(0, (tokens, -1))
