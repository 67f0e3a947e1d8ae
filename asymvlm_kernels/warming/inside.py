"""What a warm-up rests on inside Triton, read in 3.9; the only file of this room that names it.

A kernel's ``run(..., warmup=True)`` does all that a launch does up to compiling, which it hands to
``triton.compiler.compile``; a driver need only tell its device and target; a listener hears whether a build was found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from asymvlm_kernels._triton import triton

WARP = 32  # threads


class _Driver:
    """Stands for the GPU: one device a compute capability, so that Triton keeps what it knows of each apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.arch, WARP)


@contextlib.contextmanager
def launches_end_at_compiling(arch: int, make: Callable[[Any, Any, Any], Any]) -> Iterator[list[Any]]:
    """Inside the ``with`` block every launch yields what ``make(source, target, options)`` makes of its compilation."""
    driver, jit = triton.runtime.driver, triton.runtime.jit.JITFunction
    launch, before, made = jit.run, driver._active, []

    def run(kernel: Any, *args: Any, grid: object, warmup: bool = False, **options: Any) -> None:
        made.append(launch(kernel, *args, grid=grid, warmup=True, **options))

    def compile_later(source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        return make(source, target, dict(options or {}))

    driver.set_active(_Driver(arch))
    try:
        with patch.object(jit, "run", run), patch.object(triton.compiler, "compile", compile_later):
            yield made
    finally:
        driver._active = before


def compile_now(source: Any, target: Any, options: Any) -> bool:
    """Compile into Triton's cache; whether it was there already. Raises whatever a compiler raises."""
    hits: list[bool] = []
    with patch.object(triton.knobs.compilation, "listener", lambda *_, cache_hit, **__: hits.append(cache_hit)):
        triton.compile(source, target=target, options=options)
    return any(hits)


def cache_folder() -> str:
    return str(triton.knobs.cache.dir)
