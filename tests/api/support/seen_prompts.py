"""What methods before the decoder see of tiny prompts: made once, read by many tests."""

from __future__ import annotations

import copy
import functools

import torch
from checks import uniform
from shared_models import build_once
from tiny import make_batch, single_rows

import asymvlm
from asymvlm.methods import BeforeMethod, VisionPrompt
from asymvlm.models import adapter_for

NO_PIXELS = ("llava_onevision",)


class Watch(BeforeMethod):
    """Keeps what it sees, and all that can be read of it."""

    name = "watch"
    needs_tower = needs_tower_attention = True
    model_type = ""

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        self.prompt = prompt
        _ = prompt.cells, prompt.features, prompt.tower_keys, prompt.project
        if self.model_type not in NO_PIXELS:
            _ = prompt.pixels
        return prompt.tower_attention


def see(model, inputs) -> VisionPrompt:
    watch, adapter = Watch(), adapter_for(model)
    vision, watch.model_type = uniform(0.5, method=watch), adapter.model_type
    if not adapter.deepstack:
        asymvlm.prune_inputs(model, vision, **inputs)
        return watch.prompt
    with torch.no_grad(), asymvlm.patch(copy.deepcopy(model), vision=vision) as handle:
        handle.model(**inputs)
    return watch.prompt


@functools.cache
def seen(family: str, batch: str, dtype: torch.dtype = torch.float32) -> VisionPrompt:
    model = build_once(family)
    inputs = make_batch(family, batch)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return see(model, inputs)


@functools.cache
def seen_alone(family: str, batch: str) -> list[VisionPrompt]:
    """Each row of a batch by itself."""
    return [see(build_once(family), inputs) for inputs in single_rows(family, batch)]
