"""What the installed transformers calls the K/V cache: ``cache`` from 5.24 on, ``past_key_values`` before.

It asks a model's signatures for the name, and older code, ours of today in a year, says it differently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.models.phi3.modeling_phi3 import Phi3Model

NAMES = ("cache", "past_key_values")
NATIVE = next(name for name in NAMES if name in inspect.signature(Phi3Model.forward).parameters)
Function = TypeVar("Function", bound=Callable[..., Any])


def takes_the_cache(function: Function) -> Function:
    """Let a method with a parameter ``cache`` take it under either name, and show the installed one."""

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = [kwargs.pop(name) for name in NAMES if name in kwargs]
        caches = [cache for cache in given if cache is not None]
        if len(caches) > 1:
            raise ValueError(f"pass one cache, got two, as {' and '.join(NAMES)}")
        return function(*args, **kwargs, **({"cache": caches[0]} if caches else {}))

    signature = inspect.signature(function)
    shown = [
        parameter.replace(name=NATIVE) if name == "cache" else parameter
        for name, parameter in signature.parameters.items()
    ]
    either.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return either  # type: ignore[return-value]
