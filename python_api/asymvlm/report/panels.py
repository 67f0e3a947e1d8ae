"""Pixels of the pictures: a page in the colours of its patches' importance, or with the dropped ones veiled.

Arrays are ``(h * rows, w * columns, 3)`` floats in [0, 1], of patches in an ``(h, w)`` grid.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from asymvlm.files.pictures import as_rgb

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from PIL.Image import Image

COLORMAP, COLORMAP_END = "YlOrRd", 0.86  # light where unimportant; cut where the map grows too dark to read print on
MISSING = "#9e9e9e"  # patches whose score is NaN
VEIL = (0.80, 0.82, 0.85)  # over dropped patches; darker than paper, so that a dropped blank patch shows too
VEIL_ALPHA = 0.86
DARKEST = 0.4  # brightness left to black print under the heat, so that a dark photograph keeps its colours
CLIPPED = 0.01  # share of the patches at each end that saturates the colours: one outlier must not flatten the rest
PAGE_PIXELS = 1200  # long side of the page inside the figure


class PlotDependencyError(ImportError):
    """matplotlib is not installed."""


def page_pixels(image: Image, height: int, width: int, side: int = PAGE_PIXELS) -> np.ndarray:
    """The image as ``(h * rows, w * columns, 3)`` floats in [0, 1]: whole pixels for every patch.

    The long side has ``side`` pixels or a few more.
    """
    rows, columns = (
        math.ceil(side * length / max(image.size) / n) for length, n in ((image.height, height), (image.width, width))
    )
    return np.asarray(as_rgb(image).resize((width * columns, height * rows)), dtype=np.float64) / 255


def colours_of(values: np.ndarray) -> ScalarMappable:
    """The scale of colours of ``(h, w)`` scores; NaN is grey. Raises PlotDependencyError without matplotlib."""
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [CLIPPED, 1 - CLIPPED]) if finite.size else (0.0, 1.0)
    colormap = ListedColormap(colormaps[COLORMAP](np.linspace(0, COLORMAP_END, 256))).with_extremes(bad=MISSING)
    return ScalarMappable(Normalize(low, max(high, low + 1e-6)), colormap)


def tinted(page: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Multiply the page's brightness by the patches' colours: white paper takes exactly the colour of the scale."""
    grey = page @ np.array([0.299, 0.587, 0.114])
    return _spread(patches, page) * (DARKEST + (1 - DARKEST) * grey)[..., None]


def veiled(page: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Lay a veil over dropped patches: what the decoder no longer sees."""
    below = VEIL_ALPHA * np.array(VEIL) + (1 - VEIL_ALPHA) * page
    return np.where(_spread(kept, page)[..., None], page, below)


def _spread(patches: np.ndarray, page: np.ndarray) -> np.ndarray:
    """Repeat each patch's value over its pixels of ``page``."""
    rows, columns = page.shape[0] // patches.shape[0], page.shape[1] // patches.shape[1]
    return patches.repeat(rows, axis=0).repeat(columns, axis=1)


def require_matplotlib() -> None:
    """Raises PlotDependencyError, which names the extra to install, if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotDependencyError(
            "drawing a heatmap needs matplotlib, which cannot be imported: pip install 'asymvlm-kernels[plot]'"
        ) from error
