"""Phi-3.5-Vision's image path: CLIP features of crops to tokens for the decoder.

An image is a global view and h x w crops of it. Each gives 24 x 24 CLIP features, merged two by two to 12 x 12. The
crops are laid out as one picture of 12h x 12w; a learned ``sub_GN`` ends each row, ``glb_GN`` stands before the global
view, and a two-layer MLP maps all of it into the decoder: (hw + 1) * 144 + 1 + (h + 1) * 12 tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from asymvlm.models.phi3_v.configuration_phi3_v import Phi3VConfig


class Phi3VTower(nn.Module):
    """CLIP under the name it had when the checkpoints were written; transformers has since dropped one level.

    Layers run here one by one up to the one that is asked for. ``output_hidden_states`` would keep them all, and inside
    a model that records its own hidden states transformers 5 counts a tower's twice from the second call on.
    """

    def __init__(self, config: CLIPVisionConfig, attention: str | None, layer: int) -> None:
        super().__init__()
        tower: Any = CLIPVisionModel._from_config(config, attn_implementation=attention)
        self.vision_model = getattr(tower, "vision_model", tower)
        self.depth = layer if layer >= 0 else config.num_hidden_layers + 1 + layer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(N, 3, R, R)`` -> ``(N, patches, C)``, the class token left out."""
        hidden = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        for layer in self.vision_model.encoder.layers[: self.depth]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """From crops to decoder embeddings."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision = config.vision_config
        layer = config.img_processor.get("layer_idx", -2)
        self.img_processor = Phi3VTower(vision, config._attn_implementation, layer)
        width = 4 * vision.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.crop_size = vision.image_size
        self.crop_side = config.crop_side

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            pixel_values: ``(I, 1 + C, 3, R, R)``: the global view, the crops row by row, unused crops.
            image_sizes: ``(I, 2)`` int, height and width of the picture the crops make up, multiples of R.
        Returns:
            ``(T, D)``, the images' tokens one after another.
        Raises:
            ValueError: if the two do not fit.
        """
        layouts = self._layouts(pixel_values, image_sizes)
        views = torch.cat([crops[: 1 + h * w] for crops, (h, w) in zip(pixel_values, layouts)])
        weight = cast("torch.Tensor", self.img_projection[0].weight)
        tokens = self._merge_two_by_two(self.img_processor(views.to(weight.device, weight.dtype)))
        pieces, start = [], 0
        for h, w in layouts:
            crops = tokens[start + 1 : start + 1 + h * w].unflatten(0, (h, w)).transpose(1, 2)  # (h, 12, w, 12, 4C)
            pieces += [self._end_rows(crops.flatten(2, 3).flatten(0, 1)), self.glb_GN[0], self._end_rows(tokens[start])]
            start += 1 + h * w
        return self.img_projection(torch.cat(pieces))

    def lengths(self, image_sizes: torch.Tensor) -> list[int]:
        """Tokens of each image, separators included."""
        side, layouts = self.crop_side, (image_sizes // self.crop_size).tolist()
        return [(h * w + 1) * side * side + 1 + (h + 1) * side for h, w in layouts]

    def _layouts(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of crops of each image."""
        size = self.crop_size
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != (3, size, size):
            raise ValueError(
                f"pixel_values must be (images, views, 3, {size}, {size}), got {tuple(pixel_values.shape)}"
            )
        if image_sizes is None or tuple(image_sizes.shape) != (len(pixel_values), 2):
            found = None if image_sizes is None else tuple(image_sizes.shape)
            raise ValueError(f"image_sizes must be ({len(pixel_values)}, 2), one row an image, got {found}")
        for height, width in image_sizes.tolist():
            h, w = height // size, width // size
            if min(h, w) < 1 or (h * size, w * size) != (height, width) or h * w >= pixel_values.shape[1]:
                raise ValueError(
                    f"image_sizes must be multiples of {size} for at most {pixel_values.shape[1] - 1} crops, "
                    f"got {height}x{width}"
                )
        return [(height // size, width // size) for height, width in image_sizes.tolist()]

    def _merge_two_by_two(self, patches: torch.Tensor) -> torch.Tensor:
        """``(N, 24 * 24, C)`` -> ``(N, 12, 12, 4C)``: four neighbours side by side in the channels, row by row."""
        side = self.crop_side
        return patches.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(3)

    def _end_rows(self, picture: torch.Tensor) -> torch.Tensor:
        """``(rows, columns, 4C)`` -> ``(rows * (columns + 1), 4C)`` with `sub_GN` at the end of each row."""
        return torch.cat([picture, self.sub_GN[0].expand(len(picture), -1, -1)], 1).flatten(0, 1)
