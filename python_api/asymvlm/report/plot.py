"""Which patches the scorer wants, drawn over the image: the picture of the paper's Figure 2.

Needs matplotlib (``pip install 'asymvlm-kernels[plot]'``), imported when a figure is drawn. None of its global state is
touched: no pyplot, no backend switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asymvlm.report.panels import (
    PlotDependencyError,
    colours_of,
    page_pixels,
    require_matplotlib,
    tinted,
    veiled,
)
from asymvlm.report.pruning import scored_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from asymvlm.report.pruning import PruningReport
    from asymvlm.report.tiles import Page

OUTLINE = "#0b57a4"  # blue: no colour of the map comes near it
PANEL_INCHES = 4.2


def heatmap(
    image: Image,
    scores: torch.Tensor,
    kept: torch.Tensor,
    grid: tuple[int, int],
    *,
    title: str | None = None,
    question: str | None = None,
) -> Figure:
    """Draw the image, the importance of its patches, and what is left of it after pruning, side by side.

    Args:
        image: what the grid covers, any size; it is stretched over the grid as the model's processor does.
        scores: ``(h * w,)`` or ``(h, w)`` importance in raster order, any float dtype. NaN is drawn grey.
        kept: bool, same number of elements: True = survives.
        grid: ``(h, w)`` patches.
        title: over the figure; by default how many tokens are kept, the gap not being known here.
        question: quoted under the title.
    Returns:
        A matplotlib figure on the Agg canvas: ``figure.savefig(path)``. Its axes are labelled ``"image"``,
        ``"importance"``, ``"kept"`` and ``"scale"``; a panel's data coordinates are patches: patch (row, column) spans
        ``[column, column + 1] x [row, row + 1]``.
    Raises:
        ValueError: if ``scores`` or ``kept`` do not match ``grid``, or a score is infinite.
        PlotDependencyError: if matplotlib is missing; names the extra to install.
    """
    height, width = _check_grid(grid)
    values = _on_grid("scores", scores, height, width).astype(np.float64)
    keep = _on_grid("kept", kept, height, width).astype(bool)
    if np.isinf(values).any():
        raise ValueError(
            f"scores must be finite or NaN inside the grid, got {int(np.isinf(values).sum())} infinite ones"
        )
    figure = _new_figure(image.width / image.height)
    page = page_pixels(image, height, width)
    colours = colours_of(values)
    patches = colours.to_rgba(np.ma.masked_invalid(values))[..., :3]
    pictures = {
        "image": (page, "image"),
        "importance": (tinted(page, patches), "importance, kept patches outlined"),
        "kept": (veiled(page, keep), "what the language model still sees"),
    }
    panels = figure.subplots(1, 3)
    for axes, (name, (pixels, caption)) in zip(panels, pictures.items(), strict=True):
        axes.set_label(name)
        patch_aspect = (image.height / height) / (image.width / width)  # so that the page keeps its proportions
        axes.imshow(pixels, extent=(0, width, height, 0), aspect=patch_aspect, interpolation="antialiased")
        axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        axes.set_xlabel(caption, fontsize=9)
        for spine in axes.spines.values():
            spine.set(color="#b0b0b0", linewidth=0.6)
    _draw_outline(panels[1], keep)
    scale = figure.colorbar(colours, ax=panels, fraction=0.022, pad=0.012, aspect=32, extend="both")
    scale.ax.set_label("scale")
    scale.ax.tick_params(labelsize=8, width=0.6)
    scale.outline.set(linewidth=0.6, edgecolor="#b0b0b0")
    scale.set_label("importance score", fontsize=9)
    text = title if title is not None else f"{int(keep.sum())} of {keep.size} vision tokens kept"
    figure.suptitle(text if question is None else f"{text}\n“{_shorten(question)}”", fontsize=11)
    return figure


def report_heatmap(
    report: PruningReport,
    image: Image,
    *,
    row: int = 0,
    image_number: int = 0,
    page: Page | None = None,
    question: str | None = None,
) -> Figure:
    """Draw one image of one row of a call, titled with its importance gap and what it kept.

    Args:
        report: ``handle.last`` of a patched model.
        image: the part of the picture the grid covers (`asymvlm.app.loading.visible_region` finds it).
        row: sample in the batch.
        image_number: image within the sample, in prompt order; with ``page`` not needed.
        page: how the image's tiles lie on it (`asymvlm.report.tiles.pages`), for families that cut images. A whole view
            beside them is told in the title.
        question: quoted under the title.
    Raises:
        ValueError: if the model's adapter knows no token grid, the grid does not match the scored tokens, ``row`` or
            ``image_number`` is out of range, or images are cut and no ``page`` is given.
        PlotDependencyError: if matplotlib is missing.
    """
    grids = None if report.image_grids is None or row >= len(report.image_grids) else report.image_grids[row]
    if page is None and report.tiling != "one" and grids is not None and len(grids) > 1:
        raise ValueError(
            f"this family's images make {len(grids)} grids, tiles and whole views: page=... has to say which belong to "
            "the image (asymvlm.report.tiles.pages)"
        )
    beside = ""
    if page is None:
        scores, kept, grid = patch_grid(report, row=row, image_number=image_number)
    else:
        scores, kept, grid = page_grid(report, page, row=row)
        if page.whole is not None:
            whole = patch_grid(report, row=row, image_number=page.whole)[1]
            beside = f"; of the whole view beside it {int(whole.sum())} of {whole.numel()}"
    tier = report.tier[row]
    title = (
        f"importance gap {report.gap[row]:.3f}{f' ({tier})' if tier else ''}, "
        f"{int(kept.sum())} of {kept.numel()} vision tokens kept{beside}"
    )
    return heatmap(image, scores, kept, grid, title=title, question=question)


def page_grid(report: PruningReport, page: Page, *, row: int = 0) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """`patch_grid` of a whole page: its tiles put together where they lie.

    Raises:
        ValueError: as `report_heatmap`, or if tiles differ in size.
    """
    found = [patch_grid(report, row=row, image_number=number) for number in page.tiles]
    if len({grid for _, _, grid in found}) > 1:
        raise ValueError(f"tiles must have one size to be put together, got {[grid for _, _, grid in found]}")

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        lines = [torch.cat(parts[r * page.columns : (r + 1) * page.columns], 1) for r in range(page.rows)]
        return torch.cat(lines, 0)

    scores = joined([part for part, _, _ in found])
    return scores, joined([part for _, part, _ in found]), (scores.shape[0], scores.shape[1])


def patch_grid(
    report: PruningReport, *, row: int = 0, image_number: int = 0
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Scores and survival of one image's patches.

    Returns:
        ``(h, w)`` fp32 scores and ``(h, w)`` bool kept, both on the CPU, and ``(h, w)``.
    Raises:
        ValueError: as `report_heatmap`.
    """
    if report.scores is None:
        raise ValueError("keep ratio 1 calls the model untouched, so nothing was scored, wanted a ratio below 1")
    if report.image_grids is None:
        raise ValueError("this model's adapter knows no (h, w) token grid, so its scores cannot be laid over the image")
    if not 0 <= row < len(report.image_grids):
        raise ValueError(f"row must be in [0, {len(report.image_grids)}), got {row}")
    grids = report.image_grids[row]
    if not 0 <= image_number < len(grids):
        raise ValueError(f"image_number must be in [0, {len(grids)}), got {image_number}")
    row_scores = report.scores[row].float().cpu()
    positions = scored_columns(row_scores)
    sizes = [h * w for h, w in grids]
    if len(positions) != sum(sizes):
        raise ValueError(f"the grids {grids} hold {sum(sizes)} tokens, but {len(positions)} tokens were scored")
    start = sum(sizes[:image_number])
    positions = positions[start : start + sizes[image_number]]
    kept = torch.isin(positions, report.index[row].cpu())
    height, width = grids[image_number]
    return row_scores[positions].view(height, width), kept.view(height, width), (height, width)


def outline_segments(kept: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Edges between kept and dropped patches of an ``(h, w)`` bool grid: ``((x, y), (x, y))`` in patch coordinates."""
    framed = np.pad(kept, 1)
    rows, columns = np.nonzero(framed[:, 1:] != framed[:, :-1])
    vertical = [((int(x), int(y) - 1), (int(x), int(y))) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(framed[1:] != framed[:-1])
    horizontal = [((int(x) - 1, int(y)), (int(x), int(y))) for y, x in zip(rows, columns, strict=True)]
    return vertical + horizontal


def _new_figure(image_aspect: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panel_width = PANEL_INCHES * min(1.0, image_aspect)
    panel_height = PANEL_INCHES * min(1.0, 1 / image_aspect)
    figure = Figure(figsize=(3 * panel_width + 1.0, panel_height + 0.9), dpi=200, layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def _draw_outline(axes: Axes, kept: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    points_per_patch = PANEL_INCHES * 72 / max(kept.shape)
    line_width = min(1.1, max(0.35, 0.1 * points_per_patch))  # a fine grid must not drown in its outlines
    segments: Sequence[Any] = outline_segments(kept)
    lines = LineCollection(segments, colors=OUTLINE, linewidths=line_width, capstyle="projecting", clip_on=False)
    axes.add_collection(lines)


def _check_grid(grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (h, w), both at least 1, got {tuple(grid)}")
    return int(grid[0]), int(grid[1])


def _on_grid(name: str, values: torch.Tensor, height: int, width: int) -> np.ndarray:
    if values.shape not in ((height * width,), (height, width)):
        raise ValueError(
            f"{name} must have shape ({height * width},) or ({height}, {width}), got {tuple(values.shape)}"
        )
    if values.dtype.is_floating_point:
        values = values.float()
    return values.detach().cpu().numpy().reshape(height, width)


def _shorten(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


__all__ = [
    "PlotDependencyError",
    "heatmap",
    "outline_segments",
    "page_grid",
    "patch_grid",
    "report_heatmap",
    "require_matplotlib",
]
