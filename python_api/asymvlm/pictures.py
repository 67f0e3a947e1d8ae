"""Images of any mode as the RGB pages that a model's processor takes."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a pixel, no sign


def as_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """An image in RGB, as a viewer shows it: what is transparent lets white paper through, deep greys are scaled.

    16-bit grey is scaled from its whole range. 32-bit integers are taken for 8 bits where none is above 255, for 16
    elsewhere; floats for [0, 1] where none is above 1, for [0, 255] elsewhere. Other modes are Pillow's to convert. An
    EXIF tag turns the page upright.

    Args:
        image: of any mode. Of an animated one the frame that it stands at, and one line of the log says so.
        name: for that line.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        logger.warning("%s is animated: frame %d of %d is used", name, image.tell() + 1, frames)
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP or image.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)  # premultiplied, in Pillow's words
        layer = image.convert(plain).convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        page.alpha_composite(layer)
        return page.convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=float(np.finfo(np.float32).max), neginf=0.0)
    if image.mode in DEEP:
        scale = 65535.0
    elif image.mode == "I":
        scale = 255.0 if values.max(initial=0) <= 255 else 65535.0
    else:
        scale = 1.0 if values.max(initial=0) <= 1 else 255.0
    return (np.clip(values / scale, 0, 1) * 255).round().astype(np.uint8)
