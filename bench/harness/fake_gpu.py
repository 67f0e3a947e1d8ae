"""A GPU that is not there: Triton's own launch runs up to the driver, and nothing is launched or compiled.

For figures of the host (`bench.host`) and for tests of what a kernel is handed: the launchers run on CPU tensors, which
nothing reads. Every kernel that Triton would compile is one object for each specialisation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from asymvlm_kernels import dispatch

_numbers = itertools.count(10_000)  # no device of this machine: Triton keeps kernels by device


class Launch(NamedTuple):
    """What a driver is asked for."""

    kernel: Any
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class FakeKernel(CompiledKernel):
    """What Triton would have compiled for ``key``."""

    def __init__(self, name: str, key: Any, options: Any, launcher: Callable[..., None]) -> None:
        self.name, self.key, self.options = name, key, options
        self.src, self.metadata, self.packed_metadata = None, options, (options.num_warps, 1, 0)
        self.module = self.function = id(self)
        self._module_pid = None  # nothing to unload
        self._run = launcher


class Launcher:
    """Stands for the class of a driver's launchers."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    def __call__(
        self,
        gridX: int,
        gridY: int,
        gridZ: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        launch_enter_hook: Any,
        launch_exit_hook: Any,
        *args: Any,
    ) -> None:
        if launch_enter_hook is not None:
            launch_enter_hook(launch_metadata)
        if self.driver.heard is not None:
            self.driver.heard(Launch(self.driver.kernels[function], (gridX, gridY, gridZ), stream, args))
        if launch_exit_hook is not None:
            launch_exit_hook(launch_metadata)


class FakeDriver:
    """``heard`` is told of every launch."""

    def __init__(self, arch: int, heard: Callable[[Launch], None] | None) -> None:
        self.arch, self.heard, self.stream, self.device = arch, heard, 0, next(_numbers)
        self.kernels: dict[int, FakeKernel] = {}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def fake_gpu(heard: Callable[[Launch], None] | None = None, arch: int = 90) -> Iterator[FakeDriver]:
    """Inside the ``with`` block kernels are launched on a GPU that is not there, from CPU tensors.

    Triton must not have decorated the kernels for its interpreter (``TRITON_INTERPRET``).
    """
    driver = FakeDriver(arch, heard)
    launcher = Launcher(driver)

    def compiled(
        self: JITFunction,
        key: Any,
        signature: Any,
        device: int,
        constexprs: Any,
        options: Any,
        attrs: Any,
        warmup: bool,
    ) -> FakeKernel:
        assert self.cache_key  # from reading the source, which finds the globals that the kernel uses
        kernel = FakeKernel(self.fn.__name__, key, options, launcher)
        self.device_caches[device][0][key] = driver.kernels[kernel.function] = kernel
        return kernel

    found = triton.runtime.driver._active
    with (
        patch.object(JITFunction, "_do_compile", compiled),
        patch.object(dispatch, "_why_not", lambda name, device: ""),
    ):
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver._active = found
