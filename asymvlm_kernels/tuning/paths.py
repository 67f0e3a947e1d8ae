"""How many launches `prune_sequence` takes on a GPU, and whether they overlap: a choice that measurements make.

Two launches one after the other everywhere until a measurement says otherwise; nothing has been measured yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefillPath:
    """``launches``: 1 or 2; one serves results of a known length only. ``overlap``: the second launch is dispatched
    while the first ends (programmatic dependent launch, sm_90 and newer)."""

    launches: int = 2
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.launches not in (1, 2):
            raise ValueError(f"launches must be 1 or 2, got {self.launches}")


DEFAULT = PrefillPath()
MEASURED: dict[str, PrefillPath] = {}  # device name: the path that bench/gpu.py found fastest there

_choice: ContextVar[PrefillPath | None] = ContextVar("asymvlm_prefill_path", default=None)


@contextlib.contextmanager
def use_path(path: PrefillPath) -> Iterator[None]:
    """Run `prune_sequence` inside the ``with`` block on one path. Every path gives the same bits."""
    token = _choice.set(path)
    try:
        yield
    finally:
        _choice.reset(token)


def prefill_path(device: torch.device) -> PrefillPath:
    """The path on ``device``: asked for, else measured, else two launches. Nothing overlaps where no GPU can do it."""
    path = _choice.get() or (MEASURED.get(torch.cuda.get_device_name(device)) if MEASURED else None) or DEFAULT
    if path.overlap and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0)):
        return PrefillPath(path.launches)
    return path
