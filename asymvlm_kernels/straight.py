"""Ops called past PyTorch's dispatcher, where it would add nothing but time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled

from asymvlm_kernels.dispatch import _registered


def straight(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, of `define_op` and without a derivative, but past PyTorch's dispatcher where that would add nothing.

    It takes 10 to 20 microseconds for a dozen arguments. It is passed where nobody traces, transforms, profiles or
    overrides calls, and every tensor is an ordinary one: then it would do no more than call what is called here.
    """
    key = f"{op._schema.name.removeprefix('asymvlm::')} run"  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        first = args[0]
        if torch.compiler.is_compiling() or _is_watched() or not (first.is_cuda or first.is_cpu):
            return op(*args)
        for arg in args:
            if type(arg) not in _ORDINARY and not (type(arg) in (list, tuple) and _ORDINARY.issuperset(map(type, arg))):
                return op(*args)
        return _registered[key](*args)

    return call


_ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float})


def _is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler wants to see the calls of ops."""
    return bool(
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )
