"""Everything that a patch could leave behind in a model, in a form that compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALL = 2**16  # values of a buffer that are compared one by one; larger ones, of quantised weights, by address
RUN_STATE = frozenset({"rope_deltas", "_previous_max_cache_length"})  # transformers' own, rewritten by every run


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of every module, configurations, and parameters: where they lie, how often written."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        config: Any = module.__dict__.get("config")
        if config is not None and hasattr(config, "to_dict"):
            state[f"{name}.config values"] = {**config.to_dict(), "attention": config._attn_implementation}
        for attribute, value in module.__dict__.items():
            state[f"{name}.{attribute}"] = list(value) if attribute == "_buffers" else _comparable(value)
    for name, parameter in model.named_parameters():
        state[f"{name} in memory"] = _in_memory(parameter)
    for name, tensor in model.named_buffers():  # LongRoPE makes its frequencies anew in every run
        small = tensor.numel() <= SMALL and not tensor.is_meta
        state[f"{name} buffer"] = tensor.tolist() if small else _in_memory(tensor)
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs, transformers' own memory of a run aside."""
    names = {name for name in before | after if name.rpartition(".")[2] not in RUN_STATE}
    return sorted(name for name in names if before.get(name, "absent") != after.get(name, "absent"))


def _in_memory(tensor: torch.Tensor) -> tuple[int | None, int | None]:
    """Where it lies and how often it was written in place."""
    place = None if tensor.is_meta else tensor.data_ptr()
    return place, None if tensor.is_inference() else tensor._version


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):  # parameters, buffers, modules, hooks: which objects, under which names
        return [(key, id(entry)) for key, entry in value.items()]
    return value if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else id(value)
