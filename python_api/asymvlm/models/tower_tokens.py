"""Which patches of the vision tower a vision token is made from, and their mean: tower features by vision token.

A tower hands out hidden states by patch. A projector then drops the class token, joins blocks of patches, puts crops
together and cuts their padding away. The functions here follow the same path with the mean in place of the projector's
own sum, and return ``(tokens, width)`` in the order of the family's grids: image after image, each row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from asymvlm.models.adapter import Grid, Inputs

TowerTokens = Callable[[nn.Module, Inputs, torch.Tensor, Sequence[Grid]], torch.Tensor]


def pictures(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """One grid for each picture ``(pictures, patches, width)`` of a square tower, a class token in front left out."""
    if len(hidden) != len(grids):
        raise ValueError(f"the tower saw {len(hidden)} pictures for {len(grids)} grids of tokens")
    return torch.cat([pooled(square(one), grid).flatten(0, 1) for one, grid in zip(hidden, grids, strict=True)])


def maps(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """As `pictures`, of a convolutional tower, ``(pictures, width, rows, columns)``."""
    return pictures(model, inputs, hidden.flatten(2).transpose(1, 2), grids)


def blocks(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """The patches of a token lie one behind the other, ``(patches, width)`` over all images."""
    tokens = sum(rows * columns for rows, columns in grids)
    return hidden.flatten(0, -2).unflatten(0, (tokens, -1)).mean(1)


def windowed_blocks(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """As `blocks`, window by window (Qwen2.5-VL)."""
    config: Any = model.config
    tower = config.vision_config
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size
    order, start = [], 0
    for name in ("image_grid_thw", "video_grid_thw"):
        for frames, height, width in inputs[name].tolist() if inputs.get(name) is not None else ():
            rows, columns = height // tower.spatial_merge_size, width // tower.spatial_merge_size
            cells = [(t, r, c) for t in range(frames) for r in range(rows) for c in range(columns)]
            ranked = sorted(range(len(cells)), key=lambda n: _window(cells[n], side))
            order += [start + number for number in ranked]
            start += len(cells)
    found = blocks(model, inputs, hidden, grids)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)


def _window(cell: tuple[int, int, int], side: int) -> tuple[int, ...]:
    frame, row, column = cell
    return frame, row // side, column // side, row, column


def joined_images(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """Images of their own sizes one behind the other, each row by row: ``(1, patches of all images, width)``."""
    hidden = hidden.flatten(0, -2)
    side = math.isqrt(len(hidden) // sum(rows * columns for rows, columns in grids))
    parts = hidden.split([rows * columns * side**2 for rows, columns in grids])
    return torch.cat([
        pooled(part.view(rows * side, columns * side, -1), (rows, columns)).flatten(0, 1)
        for part, (rows, columns) in zip(parts, grids, strict=True)
    ])  # fmt: skip


def padded_images(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """Images of their own sizes, padded to the largest: ``(images, most patches, width)``, ``spatial_shapes``."""
    shapes = inputs["spatial_shapes"].tolist()
    return torch.cat([
        pooled(one[: height * width].view(height, width, -1), grid).flatten(0, 1)
        for one, (height, width), grid in zip(hidden, shapes, grids, strict=True)
    ])  # fmt: skip


def whole_view_first(
    layout: Callable[[nn.Module, Inputs], list[tuple[int, int]]],
    unpad: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> TowerTokens:
    """A whole view, then crops put together less their padding, for each image.

    Args:
        layout: rows and columns of crops of each image. unpad: ``(width, rows, columns)`` and the image's size to the
            same without padding.
    """

    def tokens(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        parts, start = [], 0
        for number, (rows, columns) in enumerate(layout(model, inputs)):
            whole, crops = grids[2 * number : 2 * number + 2]
            parts.append(pooled(square(hidden[start]), whole).flatten(0, 1))
            start += 1
            if 0 in crops:
                continue
            joined = join([square(one) for one in hidden[start : start + rows * columns]], rows, columns)
            start += rows * columns
            joined = unpad(joined.permute(2, 0, 1), inputs["image_sizes"][number].cpu()).permute(1, 2, 0)
            parts.append(pooled(joined, crops).flatten(0, 1))
        return torch.cat(parts)

    return tokens


def whole_view_last(layout: Callable[[nn.Module, Inputs], list[tuple[int, int]]]) -> TowerTokens:
    """The tower sees a whole view, then the crops; the prompt has the crops put together, then the whole view."""

    def tokens(model: nn.Module, inputs: Inputs, hidden: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        parts, start, shapes = [], 0, layout(model, inputs)
        used = [1 + rows * columns for rows, columns in shapes]
        if sum(used) != len(hidden):  # crops that fill an image up to the most of any were seen too
            used = [len(hidden) // len(shapes)] * len(shapes)
        for number, (rows, columns) in enumerate(shapes):
            crops, whole = grids[2 * number : 2 * number + 2]
            view = square(hidden[start])
            block = len(view) // whole[0]
            joined = join([square(one) for one in hidden[start + 1 : start + 1 + rows * columns]], rows, columns)
            joined = joined[: crops[0] * block, : crops[1] * block]  # less the padding of an image
            parts += [pooled(joined, crops).flatten(0, 1), pooled(view, whole).flatten(0, 1)]
            start += used[number]
        return torch.cat(parts)

    return tokens


def square(patches: torch.Tensor) -> torch.Tensor:
    """``(patches, width)`` as ``(side, side, width)``; a class token in front is left out."""
    side = math.isqrt(len(patches))
    return patches[len(patches) - side**2 :].view(side, side, -1)


def join(crops: Sequence[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """Crops ``(side, side, width)`` row by row as one picture ``(rows * side, columns * side, width)``."""
    grid = torch.stack(list(crops)).unflatten(0, (rows, columns))
    return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def pooled(patches: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Means of equal blocks of patches, ``(rows, columns, width)``.

    Raises:
        ValueError: where the blocks would not be equal.
    """
    (rows, columns), (height, width) = grid, patches.shape[:2]
    if height % rows or width % columns:
        raise ValueError(f"{rows} x {columns} tokens are not equal blocks of {height} x {width} patches")
    return patches.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).mean((1, 3))
