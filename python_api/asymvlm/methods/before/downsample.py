"""Downsampling, the control that every method must beat: a smaller picture of the same number of tokens.

Methods of the literature are compared with random tokens. A user who wants fewer tokens has a simpler way: shrink the
image. `Downsample` does it to the grid of tokens, `image_size_for` says how to do it to the image itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.models.adapter import Grid
from asymvlm_kernels.millionths import part_of


@dataclass(frozen=True)
class Downsample(SelectingMethod):
    """Every grid of tokens is pooled to fewer rows and columns; each pooled token is a mean weighted by area.

    The new grid has the shape of the old one and at most its share of the budget, mostly fewer: a report's ``kept``
    tells how many. Every grid keeps one at least. A pooled token lies at the position of the token nearest to the
    centre of its area, of equally near ones the first; where that is the prompt's last token, it stays as it is. The
    frames of a video are one tall picture.
    """

    name: ClassVar[str] = "downsample"
    needs_grid: ClassVar[bool] = True

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        prunable, embeds = prompt.tokens.prunable, prompt.embeds.clone()
        mask = torch.zeros_like(prunable)
        for row, (count, grids) in enumerate(zip(counts.tolist(), _grids_of_rows(prompt), strict=True)):
            total, before = sum(grid.numel() for grid in grids), 0
            for grid in grids:  # columns of the prompt, (height, width)
                share = count * (before + grid.numel()) // total - count * before // total
                before += grid.numel()
                height, width = grid.shape
                rows, columns = grid_within(max(share, 1), (height, width))
                down, across = (_areas(*sizes, embeds.device) for sizes in ((rows, height), (columns, width)))
                pooled = torch.einsum("ih,hwd,jw->ijd", down, prompt.embeds[row, grid].float(), across)
                places = grid[_centres(rows, height)][:, _centres(columns, width)]
                goes = prunable[row, places]
                mask[row, places[goes]] = True
                embeds[row, places[goes]] = pooled[goes].to(embeds.dtype)
        return Kept(mask, embeds, alone=True)


def grid_within(count: int, grid: Grid) -> Grid:
    """Rows and columns, as many as fit in ``count``, of about the shape of a ``grid`` and no larger than it."""
    height, width = grid
    ideal = math.isqrt(count * height // width)
    found = list[tuple[int, float, int, int]]()
    for rows in {min(max(ideal + more, 1), height, count) for more in (0, 1)}:
        columns = min(width, count // rows)
        sides = rows * width, columns * height  # equal where the shape is
        found.append((rows * columns, -max(sides) / min(sides), columns, rows))
    *_, columns, rows = max(found)  # of equal ones the wider: text is read along its lines
    return rows, columns


def image_size_for(keep: float, size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The size to shrink an image to so that a model sees a share of its tokens: the control without any library.

    For processors that take images of any size (Qwen: ``patch`` is 28, patch times merge). Those that bring every image
    to one size undo it, there only `Downsample` is of use.

    Args:
        keep: share of the tokens, in (0, 1].
        size: height and width of the image in pixels, as the processor would show it to the model.
        patch: pixels along a side of a token.
    Returns:
        Height and width, multiples of ``patch``, for ``image.resize((width, height))``.
    Raises:
        ValueError: naming the value found and the value wanted.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a share in (0, 1], got {keep!r}")
    height, width = (side // patch for side in size)
    if min(height, width) < 1:
        raise ValueError(f"an image must be at least {patch} x {patch} pixels, got {size[0]} x {size[1]}")
    rows, columns = grid_within(max(1, part_of(height * width, keep)), (height, width))
    return rows * patch, columns * patch


def _grids_of_rows(prompt: VisionPrompt) -> list[list[torch.Tensor]]:
    """The columns of each row's grids, ``(height, width)`` int64 each, in reading order."""
    cells = prompt.cells
    numbers = torch.where(cells.line < 0, -1, cells.line - cells.row)  # one for each grid
    found = []
    for row, mine in enumerate(numbers):
        grids = []
        for number in dict.fromkeys(number for number in mine.tolist() if number >= 0):
            columns = (mine == number).nonzero()[:, 0]
            height, width = int(cells.height[row, columns[0]]), int(cells.width[row, columns[0]])
            if len(columns) != height * width:
                raise ValueError(f"downsampling needs all {height} x {width} tokens of an image, got {len(columns)}")
            grids.append(columns.view(height, width))
        found.append(grids)
    return found


def _areas(parts: int, length: int, device: torch.device) -> torch.Tensor:
    """``(parts, length)`` fp32: which share of each of ``parts`` equal stretches each of ``length`` tokens has."""
    part, token = torch.arange(parts)[:, None], torch.arange(length)  # a stretch is ``length`` long, a token ``parts``
    ends = torch.minimum((part + 1) * length, (token + 1) * parts)
    return ((ends - torch.maximum(part * length, token * parts)).clamp_min(0).float() / length).to(device)


def _centres(parts: int, length: int) -> list[int]:
    """The token nearest to the middle of each stretch, of two the first."""
    return [-(-(2 * part + 1) * length // (2 * parts)) - 1 for part in range(parts)]
