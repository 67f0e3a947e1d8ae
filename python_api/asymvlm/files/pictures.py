"""Images of any mode as the RGB pages that a model's processor takes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a pixel, no sign


class PictureError(ValueError):
    """Pixels whose brightness cannot be told. One line: the values found and the values wanted."""


def as_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """An image in RGB, as a viewer shows it: what is transparent lets white paper through, deep greys are scaled.

    16-bit grey is scaled from its whole range. 32-bit integers are taken for 8 bits where none is above 255, for 16
    elsewhere; floats for [-1, 1] where one is negative, for [0, 1] where none is above 1, and else as integers are.
    Other modes are Pillow's to convert. An EXIF tag turns the page upright.

    Args:
        image: of any mode. Of an animated one the frame that it stands at, and one line of the log says so.
        name: for that line, and for errors.
    Raises:
        PictureError: for NaN, and for values outside these ranges.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        logger.warning("%s is animated: frame %d of %d is used", name, image.tell() + 1, frames)
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP or image.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(image, name)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)  # premultiplied, in Pillow's words
        layer = image.convert(plain).convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        page.alpha_composite(layer)
        return page.convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> np.ndarray:
    pixels = np.asarray(image)
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise PictureError(f"{name} holds pixels that are NaN or infinite, wanted numbers")
    low, high = values.min(initial=0), values.max(initial=0)
    if low < (-1 if image.mode == "F" else 0) or high > (1 if low < 0 else 65535):
        raise PictureError(
            f"{name} holds pixels from {low:g} to {high:g}, wanted [0, 255], [0, 65535], or floats in [0, 1] or [-1, 1]"
        )
    if low < 0:
        values = (values + 1) / 2
    elif image.mode in DEEP or high > 255:
        values = values / 65535
    elif image.mode == "I" or high > 1:
        values = values / 255
    grey = (values * 255).round().astype(np.uint8)
    clear = image.info.get("transparency")  # of deep grey: the one value that is transparent
    return grey if clear is None else np.where(pixels == clear, np.uint8(255), grey)


def as_page(image: Any, name: str = "image") -> Any:
    """`as_rgb` of an image; anything else (an array, a tensor, a URL) as it is, for the processor to judge."""
    return as_rgb(image, name) if isinstance(image, Image.Image) else image
