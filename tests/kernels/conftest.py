"""Guarded scratch: whatever a launcher allocates is poisoned, and lies between guards that no kernel may touch.

A kernel that leaves a slot unwritten, reads one, or writes outside answers wrongly instead of luckily. And in Triton's
interpreter a product of one order on every CPU (see `interpreter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import torch
from cuda_library import library_path

from asymvlm_kernels import use_backend
from asymvlm_kernels._triton import INTERPRETED
from asymvlm_kernels.launch import forget

GUARD = 256  # elements on either side: keeps 16-byte alignment

torch.set_num_threads(1)  # the interpreter is sequential, and pytest-xdist starts a worker a core


def poison_of(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 90  # not -1, which pads an index


@pytest.fixture(autouse=True)
def guarded_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain_empty, guarded = torch.empty, []

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        tensor = plain_empty(*size, **options)
        if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.is_complex() or not tensor.is_contiguous():
            return tensor
        whole = torch.full((tensor.numel() + 2 * GUARD,), poison_of(tensor.dtype)).to(tensor.device, tensor.dtype)
        guarded.append((whole, whole[:GUARD].clone()))
        return whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for whole, guard in guarded:
        for side in (whole[:GUARD], whole[-GUARD:]):
            assert torch.equal(side.view(torch.uint8), guard.view(torch.uint8)), "a kernel wrote outside its tensor"


@pytest.fixture(autouse=True)
def no_tapes() -> None:
    """A launcher that was called before would be replayed, past whatever a test puts in the place of its kernels."""
    forget()


@pytest.fixture(scope="session", autouse=True)
def one_order_of_sums() -> Iterator[None]:
    """The interpreter's ``tl.dot`` is `interpreter.product`."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            interpreter.install(patch)
        yield


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """The public functions run the Triton kernels: on the device, or in the interpreter."""
    with use_backend("triton"):
        yield


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> str:
    """The CUDA library is found: on a GPU the real one, else the same kernels in the emulator."""
    path = library_path()
    monkeypatch.setenv("ASYMVLM_CUDA_LIBRARY", path)
    return path


@pytest.fixture
def cuda_backend(cuda_library: str) -> Iterator[None]:
    with use_backend("cuda"):
        yield
