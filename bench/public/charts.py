"""Charts of public tables (vega-datasets), drawn by matplotlib: images that no generator of the training pages made."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

INCHES, DOTS = 3, 128  # of a square chart
TABLES = Path("vega_datasets") / "_data"


def wheat(folder: Path) -> Image:
    """Price of wheat by year (Playfair, 1822), as bars."""
    rows = json.loads((folder / TABLES / "wheat.json").read_text())
    figure, axes = _figure()
    years = [int(row["year"]) for row in rows]
    axes.bar(years, [row["wheat"] for row in rows], width=4, color="blue")
    return _drawn(figure)


def iris(folder: Path) -> Image:
    """Petals of three species of iris (Fisher, 1936), as points."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in json.loads((folder / TABLES / "iris.json").read_text()):
        groups[row["species"]].append((row["petalLength"], row["petalWidth"]))
    figure, axes = _figure()
    for colour, (_, points) in zip(("red", "green", "black"), sorted(groups.items()), strict=True):
        axes.scatter(*zip(*points, strict=True), s=30, color=colour)
    return _drawn(figure)


def electricity(folder: Path) -> Image:
    """Net generation of electricity in Iowa by source and year, as lines."""
    groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with (folder / TABLES / "iowa-electricity.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            groups[row["source"]].append((int(row["year"][:4]), float(row["net_generation"])))
    figure, axes = _figure()
    for colour, (_, points) in zip(("gray", "blue", "green"), sorted(groups.items()), strict=True):
        axes.plot(*zip(*points, strict=True), linewidth=4, color=colour)
    return _drawn(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, INCHES), dpi=DOTS, layout="constrained")
    return figure, figure.subplots()


def _drawn(figure: Any) -> Image:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS)
    return Image.open(file).convert("RGB")


__all__ = ["electricity", "iris", "wheat"]
