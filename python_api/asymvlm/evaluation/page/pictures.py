"""Pictures of lost samples: the page, and what each method left of it in the colours of its scores."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from asymvlm.app.samples import Question
from asymvlm.app.session import InputError, Session
from asymvlm.evaluation.arms import Arm
from asymvlm.evaluation.page.lost import Lost, View
from asymvlm.hf.arguments import IDS
from asymvlm.patch import patch
from asymvlm.report.panels import PlotDependencyError, colours_of, page_pixels, tinted, veiled
from asymvlm.report.placed import placed
from asymvlm.report.plot import page_grid

COLOURS = 128  # of a picture, which makes its file a quarter
SIDE = 300  # pixels of the long side: two beside each other on a phone, at its density


def draw(session: Session, arms: Sequence[Arm], samples: Sequence[Question], lost: Sequence[Lost]) -> None:
    """Ask each lost sample again under each of its settings, for one token, and draw the patches that stay.

    Args:
        session, arms, samples: of the plan of the run.
        lost: gets its pictures; where there are none, `View.why` says why.
    """
    known = {(arm.method, arm.keep): arm for arm in arms}
    for one in lost:
        sample = samples[one.sample["sample"]]
        try:
            images = list(sample.open())
            inputs = session.prepare_batch([(images, sample.question)])
        except InputError as error:  # moved or changed since
            one.full.why = str(error)
            continue
        one.full.pictures = [png(_small(image)) for image in images]
        for view in one.views:
            _draw(session, known[view.method, view.keep], inputs, images, view)


@torch.inference_mode()
def _draw(session: Session, arm: Arm, inputs: Any, images: Sequence[Image.Image], view: View) -> None:
    if arm.cache is not None:
        view.why = "its tokens go from the cache, in every layer others"
        return
    with patch(session.model, vision=arm.vision) as handle:
        session.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        report = handle.last
    assert report is not None
    try:
        for seen, page in placed(report, session.processor, inputs[IDS], images):
            scores, kept, (height, width) = page_grid(report, page)
            pixels = page_pixels(seen, height, width, SIDE)
            view.pictures.append(png(veiled(_coloured(pixels, scores.numpy()), kept.numpy())))
    except ValueError as error:
        view.pictures, view.why = [], str(error)


def _coloured(page: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The page in the colours of its scores; as it is without matplotlib, which knows the colours."""
    values = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
    try:
        return tinted(page, colours_of(values).to_rgba(np.ma.masked_invalid(values))[..., :3])
    except PlotDependencyError:
        return page


def _small(image: Image.Image) -> np.ndarray:
    return page_pixels(image, 1, 1, SIDE)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of ``(h, w, 3)`` floats in [0, 1]."""
    file = io.BytesIO()
    image = Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
    image.quantize(COLOURS).save(file, "PNG")
    return file.getvalue()


__all__ = ["draw", "png"]
