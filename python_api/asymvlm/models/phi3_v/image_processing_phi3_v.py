"""Phi-3.5-Vision's HD transform: an image becomes a global view and up to ``num_crops`` square crops."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

WHITE = (255, 255, 255)


class Phi3VImagesKwargs(ImagesKwargs, total=False):
    """Read by transformers at run time, hence no ``from __future__ import annotations`` in this file."""

    num_crops: int | None


class Phi3VImageProcessor(BaseImageProcessor):
    """Images to ``pixel_values`` and ``image_sizes``, bit for bit as the public code does it.

    Args:
        num_crops: most crops of one image; the hub advises 4 for several images and 16 for one.
        crop_pixels: side of a crop, the tower's image size.
        num_img_tokens: tokens of one crop without separators, a square number.
        image_mean, image_std: of each channel, for pixels in [0, 1].
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Phi3VImagesKwargs

    def __init__(
        self,
        num_crops: int = 4,
        crop_pixels: int = 336,
        num_img_tokens: int = 144,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_crops = num_crops
        self.crop_pixels = crop_pixels
        self.num_img_tokens = num_img_tokens
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self, images: Any, num_crops: int | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Cut images into views.

        Args:
            images: PIL images, numpy arrays, torch tensors or locations, one or nested lists of them.
            num_crops: in place of the processor's own.
            return_tensors: "pt", "np" or None.
        Returns:
            ``pixel_values`` ``(I, num_crops + 1, 3, R, R)`` fp32: global view, crops row by row, zeros;
            ``image_sizes`` ``(I, 2)``, height and width in pixels that the crops cover; ``num_img_tokens``, a list.
        Raises:
            ValueError: if an image has no pixels, or ``num_crops`` is below 1.
        """
        most = self.num_crops if num_crops is None else num_crops
        if most < 1:
            raise ValueError(f"num_crops must be at least 1, got {most}")
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        canvases = [self.canvas(image, most, number) for number, image in enumerate(flat)]
        views = torch.zeros(len(flat), most + 1, 3, self.crop_pixels, self.crop_pixels)
        for view, canvas in zip(views, canvases):
            self._fill(view, canvas)
        data = {
            "pixel_values": views.numpy() if return_tensors == "np" else views,
            "image_sizes": [[canvas.height, canvas.width] for canvas in canvases],
            "num_img_tokens": [self._count(canvas.height, canvas.width) for canvas in canvases],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def canvas(self, image: Any, num_crops: int | None = None, number: int = 0) -> Image.Image:
        """The picture that is cut into crops: resized along the long side, padded with white along the short one."""
        picture = _to_rgb(image, number)
        is_portrait = picture.width < picture.height
        if is_portrait:  # transposed before resizing, not after: resampling rounds between its two passes
            picture = picture.transpose(Image.Transpose.TRANSPOSE)
        width, height = self._resized(*picture.size, self.num_crops if num_crops is None else num_crops)
        padded = Image.new("RGB", (width, self._up(height)), WHITE)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        padded.paste(resized, (0, (padded.height - height) // 2))
        return padded.transpose(Image.Transpose.TRANSPOSE) if is_portrait else padded

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Tokens of an image of this size; the name is the public code's."""
        wide, high = self._resized(max(width, height), min(width, height), self.num_crops)
        padded = (wide, self._up(high))
        return self._count(*(padded if width < height else padded[::-1]))

    def _resized(self, width: int, height: int, num_crops: int) -> tuple[int, int]:
        """The largest width of whole crops, for a landscape, so that there are at most ``num_crops``."""
        ratio = width / height
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
            columns += 1
        wide = columns * self.crop_pixels
        return wide, max(int(wide / ratio), 1)

    def _up(self, pixels: int) -> int:
        return math.ceil(pixels / self.crop_pixels) * self.crop_pixels

    def _count(self, height: int, width: int) -> int:
        rows, columns = height // self.crop_pixels, width // self.crop_pixels
        return (rows * columns + 1) * self.num_img_tokens + 1 + (rows + 1) * math.isqrt(self.num_img_tokens)

    def _fill(self, views: torch.Tensor, canvas: Image.Image) -> None:
        size = self.crop_pixels
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous().float().div(255).sub(mean).div(std)
        views[0] = nn.functional.interpolate(pixels[None], size=(size, size), mode="bicubic")[0]
        crops = pixels.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        views[1 : 1 + len(crops)] = crops


def _to_rgb(image: Any, number: int) -> Image.Image:
    shape = (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape)
    if 0 in shape:
        raise ValueError(f"image {number} has no pixels, its shape is {shape}")
    picture: Image.Image = image if isinstance(image, Image.Image) else to_pil_image(image)
    return picture.convert("RGB")
