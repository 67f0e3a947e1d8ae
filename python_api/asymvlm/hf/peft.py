"""Models inside others: whoever wraps one calls it, so the patch goes on what is inside."""

from __future__ import annotations

from typing import Any

from torch import nn

WRAPPERS = (
    ("OptimizedModule", "_orig_mod", "patch it first and torch.compile it then"),  # compiled code skips later hooks
    ("DataParallel", "module", "patch the model inside"),
    ("DistributedDataParallel", "module", "patch the model inside"),
    ("FullyShardedDataParallel", "module", "patch the model inside"),
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model in a PEFT model, any other model as it is.

    Raises:
        TypeError: for a wrapper whose calls would pass by what is put on the model inside: name the model instead.
        NotImplementedError: for PEFT methods that put virtual tokens before the prompt.
    """
    wrapper: Any = model
    for name, inside, advice in WRAPPERS:
        if any(cls.__name__ == name for cls in type(model).__mro__):
            raise TypeError(f"{name} wraps the model that is meant, wanted the model itself: {advice} (.{inside})")
    if not (hasattr(model, "get_base_model") and hasattr(model, "active_peft_config")):
        return model
    if wrapper.active_peft_config.is_prompt_learning:
        raise NotImplementedError(
            f"{wrapper.active_peft_config.peft_type.value} puts virtual tokens before the prompt, whose places then do "
            "not fit: use an adapter that changes weights, such as LoRA"
        )
    base: nn.Module = wrapper.get_base_model()
    return base


__all__ = ["unwrapped"]
