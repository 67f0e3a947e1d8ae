"""What pruning keeps of images that no generator of ours made: ``python -m bench.public.pictures --out DIR``.

Scans from the source archive of OCRmyPDF and charts of public tables, each through a small VLM that was trained on
something else (drawn pages of text, or easy-vqa): the pictures show where its scores lead on such images, and say
nothing about answers. Needs matplotlib. Nothing that is drawn belongs into the repository: scans keep their licences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import asymvlm
from asymvlm import VisionPruning
from asymvlm.cli import console
from asymvlm.report.plot import report_heatmap
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import UniformBudget
from bench.public import charts
from bench.public.__main__ import digest, model_folder, ready
from bench.public.packages import fetch
from bench.public.scorers import SAMPLES, trained
from bench.quality.scorers import SCORERS, load_model
from bench.tinyvlm.model import CHECKPOINT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

TRAINED = {
    "pages": "a model of 0.65 M parameters that has seen drawn pages of one 8 x 8 pixel font alone",
    "easy-vqa": "a model of 0.65 M parameters that has seen easy-vqa's single coloured shapes alone",
}
KEEP = 0.33


@dataclass(frozen=True)
class Subject:
    """An image and a question about it.

    Args:
        model: one of `TRAINED`. image: makes the image from the folder of ``package``. credit: whose it is, and under
            which licence.
    """

    model: str
    package: str
    image: Callable[[Path], Image]
    question: str
    credit: str


def scan(name: str, left: int, top: int, side: int) -> Callable[[Path], Image]:
    """A square of a scan of OCRmyPDF's tests, in its own pixels: a line of text is about two cells high there."""

    def cut(folder: Path) -> Image:
        from PIL import Image

        (file,) = folder.glob(f"*/tests/resources/{name}")
        return Image.open(file).convert("RGB").crop((left, top, left + side, top + side))

    return cut


GNU = "GFDL-1.2-or-later or CC-BY-SA-3.0"
SUBJECTS = {
    "typewriter": Subject(
        "pages", "ocrmypdf", scan("typewriter.png", 120, 380, 1040), "list all keys",
        "Scan (C) 2005 Ellywa, GFDL-1.2-or-later or CC-BY-SA-1.0 to 3.0, by way of OCRmyPDF's tests",
    ),
    "brochure": Subject(
        "pages", "ocrmypdf", scan("linn.png", 540, 90, 420), "how many entries are there",
        f"Scan (C) 1985 Forat Electronics, {GNU}, by way of OCRmyPDF's tests",
    ),
    "map": Subject(
        "easy-vqa", "ocrmypdf", scan("baiona.png", 0, 0, 640), "is there a blue shape in the image",
        "Map (C) 2014 Euskaldunaa, CC-BY-SA-4.0, by way of OCRmyPDF's tests",
    ),
    "bars": Subject(
        "easy-vqa", "vega-datasets", charts.wheat, "what color is the rectangle",
        "Price of wheat, Playfair 1822, table of vega-datasets",
    ),
    "points": Subject(
        "easy-vqa", "vega-datasets", charts.iris, "is there a red shape in the image",
        "Iris, Fisher 1936, table of vega-datasets",
    ),
    "lines": Subject(
        "easy-vqa", "vega-datasets", charts.electricity, "is there a green shape in the image",
        "Electricity in Iowa, U.S. Energy Information Administration, table of vega-datasets",
    ),
}  # fmt: skip


def model_of(name: str) -> tuple[Any, Path, Scorer]:
    """Model, its folder and its learned scorer; that of easy-vqa is trained where it is not in the cache."""
    if name == "pages":
        return load_model(CHECKPOINT), CHECKPOINT, Scorer.from_pretrained(SCORERS / "default-0")
    folder = model_folder(0)
    model = ready(folder, 0)
    return model, folder, trained(model, folder / "measured" / f"{digest(folder)}-{SAMPLES}", "default", 0)


@torch.inference_mode()
def drawn(model: Any, processor: Any, scorer: Scorer, image: Image, question: str) -> Figure:
    """Image, scores and kept patches, by the library's own heatmap."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with asymvlm.patch(model, vision=VisionPruning(scorer, UniformBudget(KEEP))) as handle:
        model(**inputs)
        assert handle.last is not None
        return report_heatmap(handle.last, image, question=question)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SUBJECTS)}; repeatable.")] = None,
) -> None:
    """Draw what is kept of every image."""
    from transformers import AutoProcessor

    console.hush_transformers(progress=False)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Any, Any, Scorer]] = {}
    for name, subject in SUBJECTS.items():
        if only and name not in only:
            continue
        if subject.model not in found:
            model, folder, scorer = model_of(subject.model)
            found[subject.model] = (model, AutoProcessor.from_pretrained(folder), scorer)
        figure = drawn(*found[subject.model], subject.image(fetch(subject.package)), subject.question)
        caption = f"Scores of {TRAINED[subject.model]}.\n{subject.credit}."
        figure.text(0.5, -0.02, caption, ha="center", va="top", fontsize=8)
        figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight")
        console.out.print(f"wrote {out / name}.png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.public.pictures"))
