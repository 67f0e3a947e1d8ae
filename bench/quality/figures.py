"""Figures of the quality results: ``python -m bench.quality.figures`` writes PNGs beside the JSON files.

``accuracy.png``: exact match against kept tokens. ``gaps.png``: importance gaps of test pages (the paper's Figure 3).
``heatmaps.png``: what cosine similarity and the learned weight keep of pages of small, middle and large gap (Figure 2).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from asymvlm import VisionPruning
from asymvlm.app.session import InputError
from asymvlm.cli import console
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import UniformBudget
from bench.harness import results
from bench.quality.__main__ import OURS, RESULTS
from bench.quality.answers import answers
from bench.quality.scorers import SCORERS, load_model
from bench.quality.tables import FIRST
from bench.tinyvlm.evaluate import make_samples
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION
from bench.tinyvlm.pages import GRID, SIDE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = 100  # of the test samples, as in the tables
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def accuracy(measured: dict[str, Any]) -> Figure:
    """Lines with standard errors; the band is the full model."""
    figure, axes = _figure(7, 4.5)
    for method, rates in measured["rates"].items():
        kept = [float(ratio) * NUM_VISION for ratio in rates]
        means, errors = ([rate[name] for rate in rates.values()] for name in ("mean", "error"))
        axes.errorbar(kept, means, errors, marker="o", markersize=4, linewidth=1.5, label=method)
    full = measured["full"]
    axes.axhspan(full["mean"] - full["error"], full["mean"] + full["error"], color="0.85", label="full")
    axes.set(xlabel=f"kept vision tokens of {NUM_VISION}", ylabel="exact match", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gap_histogram(values: list[float]) -> Figure:
    figure, axes = _figure(6, 3.5)
    axes.hist(values, bins=40, color="#4878a8")
    mean, spread = float(np.mean(values)), float(np.std(values))
    axes.axvline(mean, color="k", linewidth=1)
    axes.set(xlabel="importance gap", ylabel=f"pages of {len(values)}")
    axes.set_title(f"{OURS}: mean {mean:.3f}, standard deviation {spread:.3f}", fontsize=10)
    return figure


def heatmaps(model: Any, scorer: Scorer, count: int = 200) -> Figure:
    """Three pages (lowest, middle and highest gap of the first ``count``) by page, cosine and learned, half kept."""
    from matplotlib.figure import Figure

    samples = make_samples("test", count, seed=SEED)
    pruned = {
        name: answers(model, samples, VisionPruning(weight, UniformBudget(0.5)))
        for name, weight in {"cosine": None, OURS: scorer.weight}.items()
    }
    chosen = pruned[OURS].gaps.argsort()[[count // 50, count // 2, -count // 50]].tolist()
    figure = Figure(figsize=(10, 10), layout="constrained")
    for panels, number in zip(figure.subplots(len(chosen), 3), chosen, strict=True):
        page = samples.pages.pixels[number]
        panels[0].imshow(page, cmap="gray", vmin=0, vmax=255)
        panels[0].set_title(f"“{samples.turns[number].question}”", fontsize=9)
        for axes, (name, found) in zip(panels[1:], pruned.items(), strict=True):
            kept = found.kept[number].view(GRID, GRID).numpy()
            axes.imshow(page, cmap="gray", vmin=0, vmax=255)
            heat = found.scores[number].view(GRID, GRID).numpy()
            axes.imshow(heat, cmap="YlOrRd", alpha=0.6, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
            veil = np.ma.masked_where(kept, np.ones_like(heat))
            axes.imshow(veil, cmap="gray", vmin=0, vmax=1.2, alpha=0.75, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
            axes.set_title(f"{name}, gap {found.gaps[number]:.3f}", fontsize=9)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the results, and of the pictures.")] = RESULTS,
    model: Annotated[Path, typer.Option(help="Checkpoint.")] = CHECKPOINT,
    scorer: Annotated[Path, typer.Option(help="Learned scorer of the heatmaps.")] = SCORERS / "default-0",
) -> None:
    """Draw the figures."""
    console.hush_transformers(progress=False)
    measured = results.load(out / f"{FIRST}.json")["parts"].get("uniform")
    if measured is None:
        raise InputError(f"--out: {out} holds no uniform results, run python -m bench.quality")
    drawn = {
        "accuracy": accuracy(measured),
        "gaps": gap_histogram(measured["gaps"]),
        "heatmaps": heatmaps(load_model(model), Scorer.from_pretrained(scorer)),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=110)
        console.out.print(f"wrote {out / name}.png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.quality.figures"))
