"""The images of a prompt as its vision tokens lie on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image

from asymvlm.app.loading import visible_region
from asymvlm.report.plot import patch_grid
from asymvlm.report.pruning import PruningReport
from asymvlm.report.tiles import Page, pages, texts_in_front


def placed(
    report: PruningReport, processor: Any, input_ids: torch.Tensor, images: Sequence[Image]
) -> Iterator[tuple[Image, Page]]:
    """What the grids of row 0 cover, image by image: the visible part, and how its tiles lie on it.

    Args:
        report: of the call.
        processor: that made the prompt.
        input_ids: ``(1, S)``, the unpruned ones.
        images: of the prompt, in order.
    Raises:
        ValueError: if there is nothing to draw, or it is not known where tokens lie.
    """
    patch_grid(report)  # or say why there is nothing to draw
    assert report.image_grids is not None
    texts = texts_in_front(report, input_ids, getattr(processor, "tokenizer", processor))
    sizes = [image.size for image in images]
    cropped = report.tiling in ("one", "unknown") or hasattr(processor.image_processor, "canvas")
    found = pages(report.tiling, report.image_grids[0], texts, sizes, processor.image_processor)
    for image, page in zip(images, found, strict=True):
        yield page.canvas(visible_region(image, processor.image_processor) if cropped else image), page


__all__ = ["placed"]
