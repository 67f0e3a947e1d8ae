"""Poisoned scratch: a kernel that leaves a slot unwritten, or reads one, answers wrongly instead of luckily."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from asymvlm_kernels import use_backend

torch.set_num_threads(1)  # the interpreter is sequential, and pytest-xdist starts a worker a core


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        poison = float("nan") if tensor.is_floating_point() else 90  # not -1, which pads an index
        return tensor if tensor.is_meta or tensor.is_complex() else tensor.fill_(poison)

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """The public functions run the Triton kernels: on the device, or in the interpreter."""
    with use_backend("triton"):
        yield
