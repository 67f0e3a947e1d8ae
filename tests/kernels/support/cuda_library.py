"""The CUDA library as the tests run it: the real one on a GPU that has it, else its kernels on emulated devices."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from asymvlm_kernels import build
from asymvlm_kernels.unproven.cuda import library as cuda
from asymvlm_kernels.unproven.cuda import prefill


@dataclass(frozen=True)
class Emulated:
    """A device of the emulator. ``seed``: of the order in which warps run."""

    processors: int = 6
    shared: int = 100 << 10
    clusters: bool = True  # else teams of blocks meet in L2
    bulk: bool = True  # else rows are copied 16 bytes at a time
    seed: int = 0


HOPPER = Emulated()
BLACKWELL_RTX = Emulated(clusters=False)  # sm_120: the bulk engine, no clusters
AMPERE = Emulated(clusters=False, bulk=False)
KINDS = {"hopper": HOPPER, "blackwell-rtx": BLACKWELL_RTX, "ampere": AMPERE}


def library_path() -> str:
    """File of the library that can run here; skips the test where there is none."""
    if torch.cuda.is_available():
        path = cuda.find()
        if path is None:
            pytest.skip("the CUDA library is not built")
        return str(path)
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator with")
    return str(build.build(emulator=True))


@contextmanager
def emulated(device: Emulated) -> Iterator[None]:
    """Run the block on another emulated device. Does nothing on a GPU, which is what it is."""
    library = cuda.library()
    if not library.asymvlm_emulated():
        yield
        return
    _configure(library, device)
    try:
        yield
    finally:
        _configure(library, HOPPER)


def _configure(library: ctypes.CDLL, device: Emulated) -> None:
    library.asymvlm_emulate(device.processors, device.shared, device.clusters, device.bulk, device.seed)
    prefill._plans.clear()
