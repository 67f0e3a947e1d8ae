"""How the tiles that a processor cuts a page into lie on it, so that their tokens can be drawn where they belong.

What tells it differs: tags or separators in the prompt, the size of the image, or the order of views. An image may also
be shown whole beside its tiles.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asymvlm.models.adapter import Grid
from asymvlm.report.pruning import PruningReport, scored_columns

if TYPE_CHECKING:
    from PIL.Image import Image

TAG = re.compile(r"row_(\d+)_col_(\d+)")
Place = tuple[int, int] | None  # row and column of a tile; None for a whole view


@dataclass(frozen=True)
class Page:
    """One image: grid numbers of its tiles, row by row, and of the whole view beside them."""

    rows: int
    columns: int
    tiles: tuple[int, ...]
    whole: int | None = None
    padded: bool = False  # the page lies at the upper left of its tiles, which are square

    def canvas(self, image: Image) -> Image:
        """The picture that the tiles cover: the page, with white paper where its processor padded it."""
        if not self.padded:
            return image
        side = max(image.width / self.columns, image.height / self.rows)
        from PIL import Image as images

        paper = images.new("RGB", (round(side * self.columns), round(side * self.rows)), "white")
        paper.paste(image)
        return paper


def pages(
    tiling: str, grids: Sequence[Grid], texts: Sequence[str], sizes: Sequence[tuple[int, int]], image_processor: Any
) -> list[Page]:
    """The pages of a prompt.

    Args:
        tiling: `Adapter.tiling` of the family.
        grids: of the prompt, in reading order.
        texts: what the prompt says in front of each grid.
        sizes: width and height of each image.
        image_processor: of the processor that cut the images.
    Raises:
        ValueError: if the prompt does not tell how tiles lie.
    """
    if tiling == "one" or (tiling == "unknown" and len(grids) == len(sizes)):
        found = [Page(1, 1, (number,)) for number in range(len(grids))]
    elif tiling in ("whole first", "whole last") and len(grids) % 2 == 0:
        found = [_views(grids, first, tiling == "whole first") for first in range(0, len(grids), 2)]
    elif tiling in _READERS:
        found = _placed(_READERS[tiling](texts), whole_first=tiling == "ovis", padded=tiling == "separators")
    elif tiling == "canvas":
        cut = len(grids) > len(sizes)
        found = _by_size(sizes, image_processor) if cut else [Page(1, 1, (number,)) for number in range(len(grids))]
    else:
        raise ValueError(f"it is not known how this family's {len(grids)} tiles lie on {len(sizes)} images")
    named = sum(len(page.tiles) + (page.whole is not None) for page in found)
    if len(found) != len(sizes) or named != sum(0 not in grid for grid in grids):
        raise ValueError(
            f"{len(grids)} tiles of {len(sizes)} images were found, which do not lie as this family's processor puts "
            "them: the prompt was changed, or the processor is another one"
        )
    return found


def texts_in_front(report: PruningReport, input_ids: torch.Tensor, tokenizer: Any) -> list[str]:
    """What the prompt of row 0 says in front of each grid; ``input_ids`` ``(1, S)`` are the unpruned ones."""
    assert report.image_grids is not None
    assert report.scores is not None
    places = scored_columns(report.scores[0]).tolist()
    ids, texts, taken, behind = input_ids[0].tolist(), [], 0, 0
    for rows, columns in report.image_grids[0]:
        first = places[taken] if taken < len(places) and rows * columns else behind
        texts.append(tokenizer.decode(ids[behind:first], skip_special_tokens=False))
        taken += rows * columns
        behind = places[taken - 1] + 1 if rows * columns else behind
    return texts


def _views(grids: Sequence[Grid], first: int, whole_first: bool) -> Page:
    """Two grids an image: the whole view and crops put together already. Without crops the whole view is the page."""
    whole, crops = (first, first + 1) if whole_first else (first + 1, first)
    if 0 in grids[crops]:
        return Page(1, 1, (whole,))
    return Page(1, 1, (crops,), whole)


def _tags(texts: Sequence[str]) -> list[Place]:
    """``<row_2_col_1>`` in front of each tile, something else in front of a whole view."""
    found = [TAG.findall(text)[-1:] for text in texts]
    return [(int(tag[0][0]) - 1, int(tag[0][1]) - 1) if tag else None for tag in found]


def _separators(texts: Sequence[str]) -> list[Place]:
    """Llama 4: an x separator between the tiles of a row, a y separator behind each, ``<|image|>`` before the whole."""
    places: list[Place] = []
    row = column = 0
    for text in texts:
        if "<|image_start|>" in text:
            row = column = 0
        elif "<|tile_y_separator|>" in text:
            row, column = row + 1, 0
        elif "<|tile_x_separator|>" in text:
            column += 1
        places.append(None if "<|image|>" in text else (row, column))
    return places


def _ovis(texts: Sequence[str]) -> list[Place]:
    """Ovis 2: the whole view behind ``<IMG_START>``, tiles behind ``<IMG_GRID>``, ``<IMG_COL>`` and ``<IMG_ROW>``."""
    places: list[Place] = []
    row = column = 0
    for text in texts:
        if "<IMG_START>" in text:
            places.append(None)
            continue
        if "<IMG_GRID>" in text:
            row = column = 0
        elif "<IMG_ROW>" in text:
            row, column = row + 1, 0
        else:
            column += 1
        places.append((row, column))
    return places


_READERS = {"tags": _tags, "separators": _separators, "ovis": _ovis}


def _placed(places: Sequence[Place], *, whole_first: bool, padded: bool) -> list[Page]:
    """Pages from the places of their grids: a page ends at its whole view, or begins with it."""
    found: list[list[int]] = []
    for number, place in enumerate(places):
        starts = not found or (place is None if whole_first else places[number - 1] is None or place == (0, 0))
        if starts:
            found.append([])
        found[-1].append(number)
    result = []
    for numbers in found:
        tiles = {place: number for number in numbers if (place := places[number]) is not None}
        whole = next((number for number in numbers if places[number] is None), None)
        if not tiles:
            result.append(Page(1, 1, (numbers[0],)))
            continue
        rows, columns = (1 + max(place[axis] for place in tiles) for axis in (0, 1))
        if len(tiles) != rows * columns or len(numbers) != len(tiles) + (whole is not None):
            raise ValueError(f"{len(tiles)} tiles do not fill {rows} rows of {columns}")
        in_order = tuple(tiles[row, column] for row in range(rows) for column in range(columns))
        result.append(Page(rows, columns, in_order, whole, padded))
    return result


def _by_size(sizes: Sequence[tuple[int, int]], image_processor: Any) -> list[Page]:
    """Tiles as the image processor would cut an image of that size, row by row, then the whole one."""
    choose = getattr(sys.modules[type(image_processor).__module__], "get_optimal_tiled_canvas", None)
    if choose is None:
        raise ValueError(f"a {type(image_processor).__name__} does not tell how it cuts an image into tiles")
    found, number = [], 0
    tile = (image_processor.size["height"], image_processor.size["width"])
    for width, height in sizes:
        most = (image_processor.min_patches, image_processor.max_patches)
        columns, rows = (int(side) for side in choose((height, width), tile, *most))
        count = rows * columns
        tiles = tuple(range(number, number + count))
        number += count
        whole = number if count > 1 else None
        number += whole is not None
        found.append(Page(rows, columns, tiles, whole))
    return found


__all__ = ["Page", "pages", "texts_in_front"]
