"""Llama 4: one module merges, another decodes; square tiles, separators as text, attention in chunks.

Chunks go by original position, as windows do. The temperature of its layers without rotation goes by index and grows
beyond 8192 tokens (``floor_scale``): there a pruned prompt differs from a masked one by that.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from asymvlm.models import tower_tokens
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.models.towers import square_patches, square_tiles


def _merge(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    whole: Any = model
    ids = inputs["input_ids"]
    embeds = whole.get_input_embeddings()(ids)
    features = whole.vision_model(inputs["pixel_values"], return_dict=True).last_hidden_state
    projected = whole.multi_modal_projector(features.view(-1, features.shape[-1])).to(embeds)
    places = whole.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=projected)
    return {"inputs_embeds": embeds.masked_scatter(places, projected)}


ADAPTER = Adapter(
    model_type="llama4",
    composite="language_model",
    text="model",
    per_token={"labels": -100},
    grids=square_tiles(lambda config: int(square_patches(config) * config.vision_config.pixel_shuffle_ratio**2)),
    tiling="separators",
    merge=_merge,
    chunked=True,
    tower="vision_model",
    tower_tokens=tower_tokens.pictures,
)
