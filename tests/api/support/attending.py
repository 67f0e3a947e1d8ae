"""Let a model's decoder attend by another function for a while: what the oracles close columns with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiny import text_layers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "oracle"


@contextmanager
def attending_by(model: PreTrainedModel, attend: Callable) -> Iterator[None]:
    """``attend`` has the signature of transformers' attention functions and gets the model's own masks, additive."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)  # without it a custom attention function gets no mask at all
    modules = [model.get_decoder(), *text_layers(model).modules()]
    configs = [model.config.get_text_config(), *(module.config for module in modules if hasattr(module, "config"))]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = {"": NAME}  # a string would reach the tower's configuration too
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = {"": implementation}
