"""The picture says what the report says: colours by score, outlines around what is kept, grey over what is dropped."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from asymvlm.app.loading import visible_region
from asymvlm.report import panels, plot

GRID = (3, 4)
KEPT = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
SCORES = torch.linspace(-0.2, 0.9, 12).view(GRID)
PAPER = Image.new("RGB", (200, 150), "white")


class Canvas:
    """A drawn figure, read back by panel and patch coordinates."""

    def __init__(self, figure: Figure) -> None:
        figure.set_dpi(200)
        figure.canvas.draw()
        self.pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255.0  # type: ignore[attr-defined]
        self.panels = {axes.get_label(): axes for axes in figure.axes}

    def at(self, panel: str, x: float, y: float) -> np.ndarray:
        column, row = self.panels[panel].transData.transform((x, y))
        return self.pixels[self.pixels.shape[0] - 1 - int(row), int(column)]

    def has_outline(self, x: float, y: float, *, reach: int = 3) -> bool:
        """Whether a pixel within ``reach`` of the patch coordinates has the outline's colour."""
        column, row = (round(value) for value in self.panels["importance"].transData.transform((x, y)))
        row = self.pixels.shape[0] - 1 - row
        near = self.pixels[row - reach : row + reach + 1, column - reach : column + reach + 1]
        return bool((np.abs(near - to_rgb(plot.OUTLINE)).max(-1) < 0.15).any())


def test_outlines_run_between_kept_and_dropped_and_nowhere_else() -> None:
    canvas = Canvas(plot.heatmap(PAPER, SCORES, KEPT, GRID))
    framed = np.pad(KEPT.numpy(), 1)
    height, width = GRID
    for y in range(height):
        for x in range(1, width):  # edges between neighbours; the frame has a line of its own
            assert canvas.has_outline(x, y + 0.5) == (framed[y + 1, x] != framed[y + 1, x + 1]), (x, y)
    for y in range(1, height):
        for x in range(width):
            assert canvas.has_outline(x + 0.5, y) == (framed[y, x + 1] != framed[y + 1, x + 1]), (x, y)
    assert canvas.has_outline(0, 0.5), "a kept patch at the border is closed"


def test_only_dropped_patches_are_dimmed() -> None:
    page = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((400, 300), 0)
    canvas = Canvas(plot.heatmap(page, SCORES, KEPT, GRID))
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            seen, original = canvas.at("kept", x + 0.5, y + 0.5), canvas.at("image", x + 0.5, y + 0.5)
            veiled = panels.VEIL_ALPHA * np.array(panels.VEIL) + (1 - panels.VEIL_ALPHA) * original
            np.testing.assert_allclose(seen, original if KEPT[y, x] else veiled, atol=0.02)


def test_white_paper_takes_the_colours_of_the_scale() -> None:
    figure = plot.heatmap(PAPER, SCORES, KEPT, GRID)
    canvas = Canvas(figure)
    colours = panels.colours_of(SCORES.double().numpy())
    for y in range(GRID[0]):
        for x in range(GRID[1]):
            wanted = colours.to_rgba(float(SCORES[y, x]))[:3]
            np.testing.assert_allclose(canvas.at("importance", x + 0.5, y + 0.5), wanted, atol=0.02)


def test_scale_spans_all_but_the_outermost_hundredths() -> None:
    scores = torch.linspace(0, 1, 101, dtype=torch.float64)
    scores[-1] = 50.0
    figure = plot.heatmap(PAPER, scores, torch.ones(101).bool(), (1, 101))
    scale = next(axes for axes in figure.axes if axes.get_label() == "scale")
    assert scale.get_ylim() == pytest.approx((0.01, 0.99))


def test_nan_scores_are_grey_and_do_not_move_the_scale() -> None:
    scores = SCORES.clone()
    scores[1, 2] = math.nan
    canvas = Canvas(plot.heatmap(PAPER, scores, KEPT, GRID))
    np.testing.assert_allclose(canvas.at("importance", 2.5, 1.5), to_rgb(panels.MISSING), atol=0.02)
    assert np.ptp(canvas.at("importance", 0.5, 0.5)) > 0.1, "the finite ones keep their colour"
    Canvas(plot.heatmap(PAPER, torch.full(GRID, math.nan), KEPT, GRID))


def test_print_stays_darker_than_the_paper_around_it() -> None:
    page = Image.new("RGB", (400, 300), "white")
    page.paste("black", (0, 0, 100, 100))  # patch (0, 0)
    canvas = Canvas(plot.heatmap(page, torch.zeros(12), KEPT, GRID))
    black, white = canvas.at("importance", 0.5, 0.5), canvas.at("importance", 1.5, 0.5)
    np.testing.assert_allclose(black, white * panels.DARKEST, atol=0.02)


def test_a_page_keeps_its_proportions_when_the_grid_is_square() -> None:
    figure = plot.heatmap(Image.new("RGB", (100, 300)), torch.zeros(16), torch.ones(16).bool(), (4, 4))
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    assert box.height / box.width == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_outline_length_is_the_perimeter(seed: int) -> None:
    kept = np.random.default_rng(seed).random((5, 7)) < 0.5
    framed = np.pad(kept, 1).astype(int)
    perimeter = np.abs(np.diff(framed, axis=0)).sum() + np.abs(np.diff(framed, axis=1)).sum()
    segments = plot.outline_segments(kept)
    assert len(set(segments)) == len(segments) == perimeter
    assert all(abs(x1 - x0) + abs(y1 - y0) == 1 for (x0, y0), (x1, y1) in segments)


@pytest.mark.parametrize(
    "scores,kept,grid,words",
    [
        (torch.zeros(11), KEPT, GRID, r"scores must have shape \(12,\) or \(3, 4\), got \(11,\)"),
        (SCORES, KEPT[:2], GRID, r"kept must have shape .* got \(2, 4\)"),
        (SCORES, KEPT, (0, 12), r"grid must be \(h, w\), both at least 1, got \(0, 12\)"),
        (torch.full(GRID, -math.inf), KEPT, GRID, "finite or NaN inside the grid, got 12 infinite"),
    ],
)
def test_arguments_are_checked(scores: torch.Tensor, kept: torch.Tensor, grid: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plot.heatmap(PAPER, scores, kept, grid)


def two_image_report() -> Any:
    """Row 1: two texts, a (1, 2) image, a text, a (2, 2) image with a NaN score; positions 2, 5 and 7 survive."""
    scores = torch.full((2, 9), -math.inf)
    scores[1, 2:4] = torch.tensor([0.1, 0.2])
    scores[1, 5:9] = torch.tensor([0.3, math.nan, 0.5, 0.6])
    return SimpleNamespace(
        scores=scores,
        index=torch.tensor([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 4, 5, 7]]),
        image_grids=[[], [(1, 2), (2, 2)]],
        tiling="one",
        gap=[math.nan, 0.25],
        tier=[None, "moderate"],
    )


def test_patch_grid_finds_the_patches_of_each_image() -> None:
    report = two_image_report()
    scores, kept, grid = plot.patch_grid(report, row=1)
    assert grid == (1, 2)
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.2]]))
    assert kept.tolist() == [[True, False]]
    scores, kept, grid = plot.patch_grid(report, row=1, image_number=1)
    assert grid == (2, 2)
    torch.testing.assert_close(scores, torch.tensor([[0.3, math.nan], [0.5, 0.6]]), equal_nan=True)
    assert kept.tolist() == [[True, False], [True, False]]


def test_report_heatmap_is_titled_with_gap_tier_and_count() -> None:
    figure = plot.report_heatmap(two_image_report(), PAPER, row=1, image_number=1, question="Why?\n")
    title = figure.get_suptitle()
    assert title == "importance gap 0.250 (moderate), 2 of 4 vision tokens kept\n“Why?”"


@pytest.mark.parametrize(
    "change,arguments,words",
    [
        ({"image_grids": None}, {}, "knows no .* token grid"),
        ({"scores": None}, {"row": 1}, "wanted a ratio below 1"),
        ({"image_grids": [[], [(2, 2)]]}, {"row": 1}, "hold 4 tokens, but 6 tokens were scored"),
        ({}, {"row": 2}, r"row must be in \[0, 2\), got 2"),
        ({}, {"row": 1, "image_number": 2}, r"image_number must be in \[0, 2\), got 2"),
        ({}, {"row": 0}, r"image_number must be in \[0, 0\), got 0"),
    ],
)
def test_report_that_cannot_be_drawn(change: dict[str, Any], arguments: dict[str, int], words: str) -> None:
    report = SimpleNamespace(**{**vars(two_image_report()), **change})
    with pytest.raises(ValueError, match=words):
        plot.patch_grid(report, **arguments)  # type: ignore[arg-type]


def test_visible_region_is_what_a_centre_crop_leaves() -> None:
    ramp = np.zeros((300, 200, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(300)[:, None] * 255 // 299
    image = Image.fromarray(ramp)
    crop = SimpleNamespace(do_center_crop=True, crop_size={"height": 20, "width": 20}, size={"shortest_edge": 20})
    seen = visible_region(image, crop)
    assert seen.size == (200, 200)
    assert np.asarray(seen)[0, 0, 0] == ramp[50, 0, 0]
    smaller = SimpleNamespace(do_center_crop=True, crop_size={"height": 10, "width": 10}, size={"shortest_edge": 20})
    assert visible_region(image, smaller).size == (100, 100)
    whole = SimpleNamespace(do_center_crop=False, crop_size=None, size={"height": 20, "width": 20})
    assert visible_region(image, whole) is image
