"""A convolutional tower in the place of timm's, which is no requirement: a map of features, or its cells in a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class MapTowerConfig(PretrainedConfig):
    model_type = "tiny_map_tower"
    hidden_size: int = 16
    patch_size: int = 4
    flat: bool = False
    model_args: dict | None = None  # read by Perception LM's projector


class MapTower(PreTrainedModel):
    config_class = MapTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flex_attn = True

    def __init__(self, config: MapTowerConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 4, stride=4)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutput:
        """``(B, 3, 4H, 4W)`` -> last_hidden_state ``(B, C, H, W)`` or ``(B, H * W, C)``."""
        cells = torch.tanh(self.patches(pixel_values))
        return BaseModelOutput(last_hidden_state=cells.flatten(2).mT if self.config.flat else cells)


AutoConfig.register(MapTowerConfig.model_type, MapTowerConfig, exist_ok=True)
AutoModel.register(MapTowerConfig, MapTower, exist_ok=True)
