"""Models inside others: whoever wraps one calls it, so the patch goes on what is inside."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model in a PEFT model, any other model as it is.

    Raises:
        NotImplementedError: for PEFT methods that put virtual tokens before the prompt.
    """
    wrapper: Any = model
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
