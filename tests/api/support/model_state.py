"""Everything a patch could leave behind in a model, in a form that compares."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

RUN_STATE = frozenset({"rope_deltas", "_previous_max_cache_length"})  # transformers' own, rewritten by every run
_TENSOR_DICTS = ("_parameters", "_buffers", "_modules")


def snapshot(model: PreTrainedModel) -> dict[str, object]:
    """Instance attributes and hooks of every module, by identity, parameters' addresses, and all configurations."""
    state: dict[str, object] = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    state["attention"] = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            state[f"{module_name}.{name}"] = _comparable(name, value)
    return state


def changes(before: dict[str, object], after: dict[str, object], ignore: frozenset[str] = RUN_STATE) -> set[str]:
    """Names whose state differs, the last parts in ``ignore`` aside."""
    names = {name for name in before | after if name.rpartition(".")[2] not in ignore}
    return {name for name in names if before.get(name, "absent") != after.get(name, "absent")}


def _comparable(name: str, value: object) -> object:
    if name in _TENSOR_DICTS or ("hooks" in name and isinstance(value, dict)):
        return [(key, id(entry)) for key, entry in value.items()]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)
