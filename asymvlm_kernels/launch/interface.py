"""What a replay rests on inside Triton, checked before anything is replayed.

Triton promises ``kernel[grid](...)`` and no more. A replay hands arguments to the launcher of a compiled kernel, as
`JITFunction.run` does. So it takes place only where

- `JITFunction.run` reads nothing but the names known here: a later version that looks at one more, for what it compiles
  or how it launches, is not replayed until somebody has read it;
- the launcher takes the arguments known here, and the compiled kernel is of Triton's own class;
- nobody listens or changes what is compiled: no hooks, no debugging, no instrumentation, the same driver and device.

Everywhere else, and in the interpreter, every launch is Triton's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from asymvlm_kernels._triton import HAS_TRITON, INTERPRETED

# of `JITFunction.run`, read in Triton 3.6.0 and 3.9.0
NAMES = {
    *(
        "knobs",
        "runtime",
        "compilation",
        "debug",
        "instrumentation_mode",
        "fpsan_homomorphic_casts",
        "driver",
        "active",
    ),
    *("get_current_device", "get_current_stream", "pre_run_hooks", "device_caches", "add_stages_inspection_hook"),
    *("append", "compute_cache_key", "get", "_pack_args", "_do_compile", "object", "used_global_vals", "items"),
    *("RuntimeError", "AssertionError", "callable", "len", "hasattr", "result", "launch_metadata", "values", "run"),
    *("function", "packed_metadata", "launch_enter_hook", "launch_exit_hook"),
}
LAUNCHERS: tuple[tuple[str, ...], ...] = (
    ("self", "gridX", "gridY", "gridZ", "stream", "function", "args"),  # Triton 3.6
    (
        *("self", "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata"),
        *("launch_enter_hook", "launch_exit_hook", "args"),
    ),
)


def known(names: Iterable[str]) -> bool:
    """Whether a launch of Triton that reads ``names`` is one that somebody has read."""
    return NAMES.issuperset(names)


REPLAYS = False
if HAS_TRITON and not INTERPRETED:
    try:
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime import driver as drivers
        from triton.runtime.jit import JITFunction

        RUN = JITFunction.run
        RUNTIME, COMPILATION = knobs.runtime, knobs.compilation
        REPLAYS = known(RUN.__code__.co_names) and isinstance(COMPILATION.instrumentation_mode, str)
    except (ImportError, AttributeError):  # an older or newer Triton: it launches by itself
        REPLAYS = False


def driver_if_plain() -> Any:
    """Triton's driver where a launch by Triton would do no more than launch, else None."""
    if (
        JITFunction.run is not RUN
        or RUNTIME.debug
        or RUNTIME.add_stages_inspection_hook is not None
        or COMPILATION.instrumentation_mode
        or not _silent(RUNTIME.launch_enter_hook)
        or not _silent(RUNTIME.launch_exit_hook)
    ):
        return None
    return drivers.active


def _silent(hook: Any) -> bool:
    return hook is None or not getattr(hook, "calls", True)


def can_replay(kernel: Any, compiled: Any) -> bool:
    """Whether what ``kernel[grid](...)`` returned can be launched again without ``kernel``."""
    return (
        type(kernel) is JITFunction
        and isinstance(compiled, CompiledKernel)
        and _parameters(compiled.run.__class__) in LAUNCHERS
    )


@functools.cache
def _parameters(launcher: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(launcher.__call__).parameters)


def allocator(device: torch.device) -> Callable[..., torch.Tensor]:
    """``allocate(size, stride, dtype)`` on ``device``, the current one: as compiled code of PyTorch has it."""
    found: Callable[..., torch.Tensor] | None = ALLOCATORS.get(device.type)
    return found or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device))


_compiled = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
ALLOCATORS = {kind: getattr(_compiled, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
