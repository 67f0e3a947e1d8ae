"""Procedural document pages: a grid of 12 x 12 cells of 8 x 8 pixels, one vision token a cell.

A page holds 3 to 12 entries ``K:482`` (a letter, a colon, three digits) in 24 slots, two on a line. Some of the other
slots hold symbols that mean nothing, some empty cells hold specks, and ink, position of a glyph and pixels vary.

Splits never overlap, whatever the seeds: a checksum of what is written where decides a page's split.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from bench.tinyvlm.glyphs import BLANK, LETTERS, SYMBOLS, TOKEN_ID, VOCABULARY, bitmaps

if TYPE_CHECKING:
    from PIL.Image import Image

GRID, CELL = 12, 8
SIDE = GRID * CELL  # pixels
DIGITS_IN_VALUE = 3
ENTRY = DIGITS_IN_VALUE + 2  # cells: key, colon, digits
COLUMNS = GRID // (ENTRY + 1)
SLOTS = GRID * COLUMNS

# "scorer" trains scorers, "calibration" sets budgets, choices are made on "validation", what is reported is "test"
Split = Literal["train", "scorer", "calibration", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
SHARES = {
    "train": (0, 1, 2, 3),
    "scorer": (4,),
    "calibration": (5,),
    "validation": (6,),
    "test": (7,),
}  # of checksum % 8

DISTRACTOR_SHARE, SPECK_SHARE, NOISE = 0.3, 0.2, 0.1
PAPER, INK = 0.9, 0.8  # brightness of empty paper, and how much darker the blackest ink is


@dataclass(frozen=True)
class Entry:
    """``key:value`` with the cell of its key; the other cells follow to the right."""

    key: str
    value: str
    cell: int


@dataclass(frozen=True)
class Layout:
    """What a page says and where: ``slots`` ascend, and entries come in reading order."""

    slots: tuple[int, ...]
    keys: str
    values: tuple[str, ...]
    shift: int  # columns of cells left empty on the left

    @property
    def entries(self) -> tuple[Entry, ...]:
        cells = (self.cell(slot) for slot in self.slots)
        return tuple(Entry(key, value, cell) for key, value, cell in zip(self.keys, self.values, cells, strict=True))

    def cell(self, slot: int) -> int:
        """First cell of a slot."""
        row, column = divmod(slot, COLUMNS)
        return row * GRID + column * (ENTRY + 1) + self.shift

    @property
    def split(self) -> str:
        """The split this page belongs to. ``shift`` has no say: a page and its shifted twin stay together."""
        place = zlib.crc32(repr((self.slots, self.keys, self.values)).encode()) % 8
        return next(name for name, share in SHARES.items() if place in share)


@dataclass(frozen=True)
class Pages:
    """Rendered pages.

    Attributes:
        layouts: what each page says.
        pixels: ``(B, 96, 96)`` uint8, dark ink on light paper.
        glyph: ``(B, 144)`` int64, the vocabulary id of each cell, ``BLANK`` for an empty one.
        owner: ``(B, 144)`` int64, number of the entry a cell belongs to, -1 for none, -2 for a distractor.
    """

    layouts: list[Layout]
    pixels: np.ndarray
    glyph: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.layouts)

    def image(self, number: int, scale: int = 1) -> Image:
        """The page as an RGB picture, each pixel ``scale`` x ``scale``: the processor undoes any whole scale."""
        from PIL import Image

        grey = self.pixels[number].repeat(scale, 0).repeat(scale, 1)
        return Image.fromarray(grey).convert("RGB")


def make_pages(
    seed: int | list[int],
    count: int,
    split: Split,
    entries: tuple[int, int] = (3, 12),
    noise: float = NOISE,
    distractors: float = DISTRACTOR_SHARE,
) -> Pages:
    """``count`` pages of ``split`` with ``entries[0]`` to ``entries[1]`` entries; the same seed gives the same pages.

    Args:
        distractors: share of the other slots that hold symbols.
    Raises:
        ValueError: on an unknown split, or numbers of entries that a page cannot hold.
    """
    if split not in SHARES:
        raise ValueError(f"split must be one of {', '.join(SHARES)}, got {split!r}")
    if not 1 <= entries[0] <= entries[1] <= min(SLOTS, len(LETTERS)):
        raise ValueError(f"entries must be a range within 1 to {min(SLOTS, len(LETTERS))}, got {entries}")
    rng = np.random.default_rng(seed)
    drawn = (layout for layout in _layouts(rng, entries) if layout.split == split)
    return render([next(drawn) for _ in range(count)], rng, noise, distractors)


def _layouts(rng: np.random.Generator, entries: tuple[int, int]) -> Iterator[Layout]:
    while True:
        count = int(rng.integers(entries[0], entries[1] + 1))
        slots = np.sort(rng.choice(SLOTS, count, replace=False))
        keys = rng.choice(len(LETTERS), count, replace=False)
        values = rng.integers(0, 10**DIGITS_IN_VALUE, count)
        yield Layout(
            tuple(int(slot) for slot in slots),
            "".join(LETTERS[key] for key in keys),
            tuple(f"{value:0{DIGITS_IN_VALUE}d}" for value in values),
            int(rng.integers(0, GRID - COLUMNS * (ENTRY + 1) + 2)),
        )


def render(
    layouts: list[Layout], rng: np.random.Generator, noise: float = NOISE, distractors: float = DISTRACTOR_SHARE
) -> Pages:
    """Draw ``layouts``; ``rng`` draws distractors, specks, jitter and noise."""
    count = len(layouts)
    glyph = np.full((count, GRID * GRID), BLANK, np.int64)
    owner = np.full((count, GRID * GRID), -1, np.int64)
    for page, layout in enumerate(layouts):
        for number, entry in enumerate(layout.entries):
            glyph[page, entry.cell : entry.cell + ENTRY] = [TOKEN_ID[sign] for sign in f"{entry.key}:{entry.value}"]
            owner[page, entry.cell : entry.cell + ENTRY] = number
        chosen = rng.random(SLOTS) < distractors
        signs = TOKEN_ID[SYMBOLS[0]] + rng.integers(0, len(SYMBOLS), (SLOTS, ENTRY))
        for slot in np.flatnonzero(chosen):
            if slot not in layout.slots:
                cell = layout.cell(int(slot))
                glyph[page, cell : cell + ENTRY], owner[page, cell : cell + ENTRY] = signs[slot], -2
    return Pages(layouts, _draw(glyph, rng, noise), glyph, owner)


def _draw(glyph: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    ink = _placed(bitmaps()[glyph], rng) * rng.uniform(0.6, 1.0, (len(glyph), 1, 1, 1))
    specked = (rng.random(glyph.shape) < SPECK_SHARE) & (glyph == BLANK)
    count = int(specked.sum())
    specks = rng.random((count, CELL, CELL)) < rng.uniform(0.1, 0.4, (count, 1, 1))
    ink[specked] = specks * rng.uniform(0.3, 0.8, (count, 1, 1))
    page = ink.reshape(-1, GRID, GRID, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE)
    page = page + noise * rng.standard_normal(page.shape, np.float32)
    return (255 * (PAPER - INK * page)).clip(0, 255).astype(np.uint8)


def _placed(shapes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``(B, N, 7, 5)`` glyphs at a random place of their cell: ``(B, N, 8, 8)`` ink in [0, 1]."""
    height, width = shapes.shape[2:]
    down = rng.integers(0, CELL - height + 1, shapes.shape[:2])
    right = rng.integers(0, CELL - width + 1, shapes.shape[:2])
    cells = np.zeros((*shapes.shape[:2], CELL, CELL), np.float32)
    for y in range(CELL - height + 1):
        for x in range(CELL - width + 1):
            here = (down == y) & (right == x)
            cells[here, y : y + height, x : x + width] = shapes[here]
    return cells


def words(pages: Pages, number: int) -> str:
    """A page as twelve lines of text, for eyes and error messages."""
    signs = ["." if token == BLANK else VOCABULARY[token] for token in pages.glyph[number]]
    return "\n".join("".join(signs[row * GRID : (row + 1) * GRID]) for row in range(GRID))


__all__ = ["GRID", "SPLITS", "Entry", "Layout", "Pages", "Split", "make_pages", "render", "words"]
