"""Which image a vision token belongs to, from the grids the processor announced or from runs of placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from asymvlm.models.adapter import Adapter, Grid, Grids, Inputs
from asymvlm.tokens.roles import Tokens

Layout = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, int], Grids]


def image_layout(model: nn.Module, adapter: Adapter, tokens: Tokens, inputs: Inputs) -> Layout:
    """What images lie where in the prompts of a call: the arguments of `image_numbers` and `image_cells`."""
    ids, grids = adapter.unify(tokens.ids), adapter.grids_of(model, inputs)
    return ids, tokens.vision, tokens.separators, adapter.token_ids(model), grids


def read_images(layout: Layout, views: int, first: int = 0) -> tuple[torch.Tensor, list[list[Grid]] | None]:
    """Images of the columns from ``first`` on; ``views``: grids that an image consists of.

    Returns:
        ``(B, S - first)`` int64, the image that a vision token belongs to, -1 elsewhere; and the grids of each row, as
        `grids_by_row` gives them.
    """
    ids, _, _, token_ids, grids = layout
    numbers = image_numbers(*layout)[:, first:]
    return torch.where(numbers < 0, -1, numbers // views), grids_by_row(numbers, ids, token_ids, grids)


def has_several(grids: list[list[Grid]] | None, views: int) -> bool:
    """Whether a row has several images, each with a floor of its own; so it is taken to be where grids are unknown."""
    return grids is None or any(len(row) > views for row in grids)


def image_numbers(
    input_ids: torch.Tensor,
    vision: torch.Tensor,
    separators: torch.Tensor,
    token_ids: Mapping[str, int],
    grids: Grids,
) -> torch.Tensor:
    """Number the grid (the image, where images have one) of every vision token.

    Features fill the placeholders of their kind in row-major order, so the n-th token of a kind belongs to the grid
    that holds the n-th feature; separators are in no grid and go with the token before. A kind without grids is
    numbered by contiguous runs.

    Args:
        input_ids: ``(B, S)``. vision, separators: ``(B, S)`` bool, the second a part of the first.
        token_ids: placeholder id by config name. grids: token grids by the same names.
    Returns:
        ``(B, S)`` int64, -1 where ``vision`` is False. Numbers are distinct between kinds, not consecutive in a row.
    """
    numbers = torch.full_like(input_ids, -1, dtype=torch.int64)
    offset = 0
    for name, token_id in token_ids.items():
        kind = vision & (input_ids == token_id)
        if name in grids:
            sizes = torch.tensor([rows * columns for rows, columns in grids[name]], device=input_ids.device)
            place = (kind & ~separators).flatten().cumsum(0).view_as(input_ids) - 1
            number = torch.searchsorted(sizes.cumsum(0), place, right=True)
        else:
            starts = kind.clone()
            starts[:, 1:] &= ~kind[:, :-1]
            number = starts.flatten().cumsum(0).view_as(input_ids) - 1
        numbers = torch.where(kind, number + offset, numbers)
        offset += _stride(input_ids)
    return numbers


class Cells(NamedTuple):
    """Where each vision token lies in its grid; every tensor is ``(B, S)`` int64, -1 outside of grids."""

    line: torch.Tensor  # distinct for all lines of all grids
    row: torch.Tensor  # from 0 at the top
    column: torch.Tensor  # from 0 on the left
    height: torch.Tensor  # rows of the grid
    width: torch.Tensor  # columns of the grid


def image_cells(
    input_ids: torch.Tensor,
    vision: torch.Tensor,
    separators: torch.Tensor,
    token_ids: Mapping[str, int],
    grids: Grids,
) -> Cells:
    """Place every vision token in its grid; arguments as of `image_numbers`. Separators are in none."""
    cells = Cells(*(torch.full_like(input_ids, -1, dtype=torch.int64) for _ in Cells._fields))
    offset = 0
    for name, token_id in token_ids.items():
        if not grids.get(name):
            continue
        kind = vision & (input_ids == token_id) & ~separators
        shapes = torch.tensor(grids[name], device=input_ids.device)  # (images, 2)
        ends, heights = shapes.prod(1).cumsum(0), shapes[:, 0].cumsum(0)
        place = kind.flatten().cumsum(0).view_as(input_ids) - 1
        number = torch.searchsorted(ends, place, right=True).clamp_max(len(shapes) - 1)
        inside = place - (ends - shapes.prod(1))[number]
        height, width = shapes[number].unbind(-1)
        row, column = inside // width, inside % width
        found = Cells((heights - shapes[:, 0])[number] + row + offset, row, column, height, width)
        cells = Cells(*(torch.where(kind, new, old) for new, old in zip(found, cells, strict=True)))
        offset += int(sum(rows for rows, _ in grids[name]))
    return cells


def known_cells(layout: Layout, model_type: str) -> Cells:
    """`image_cells` of a call, for whoever goes by place.

    Raises:
        ValueError: for a family whose grids are not known.
    """
    if not layout[-1]:
        raise ValueError(
            "spread, and methods that go by place, need the grid of an image's tokens, which the "
            f"{model_type} adapter does not know"
        )
    return image_cells(*layout)


def grids_by_row(
    numbers: torch.Tensor, input_ids: torch.Tensor, token_ids: Mapping[str, int], grids: Grids
) -> list[list[Grid]] | None:
    """The grids of each row's images in reading order; None where a kind of placeholder has no grids.

    Args:
        numbers: of `image_numbers`, any columns of them. input_ids: of all columns, which numbers go by.
    """
    stride = _stride(input_ids)
    known = [grids.get(name) for name in token_ids]
    rows: list[list[Grid]] = []
    for row in numbers.tolist():
        found = dict.fromkeys(number for number in row if number >= 0)
        kinds = [(known[number // stride], number % stride) for number in found]
        if any(kind is None or place >= len(kind) for kind, place in kinds):
            return None
        rows.append([kind[place] for kind, place in kinds if kind is not None])
    return rows


def _stride(input_ids: torch.Tensor) -> int:
    """Between the first numbers of two kinds: more than a kind has, and a multiple of the views of an image."""
    return 12 * (input_ids.numel() + 1)
