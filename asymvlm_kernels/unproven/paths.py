"""Other ways to launch `prune_sequence` on a GPU, for benchmarks and tests to ask for: one launch, or two that overlap.

A path names other launchers for its ops (`dispatch.use_launchers`). Two launches one after the other stay the rule
until a measurement says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm_kernels.dispatch import use_launchers
from asymvlm_kernels.prefill.prune.known_length import in_turn
from asymvlm_kernels.prefill.prune.two_launches import _gather_sequence_triton, _score_select_triton
from asymvlm_kernels.unproven.one_launch import prune_in_one_launch


@dataclass(frozen=True)
class PrefillPath:
    """``launches``: 1 or 2; one serves results of a known length only. ``overlap``: the second launch is dispatched
    while the first ends (programmatic dependent launch, sm_90 and newer)."""

    launches: int = 2
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.launches not in (1, 2):
            raise ValueError(f"launches must be 1 or 2, got {self.launches}")


@contextlib.contextmanager
def use_path(path: PrefillPath) -> Iterator[None]:
    """Run `prune_sequence` inside the ``with`` block on one path. Every path gives the same bits."""
    with use_launchers(launchers_of(path)):
        yield


def launchers_of(path: PrefillPath) -> dict[str, Callable[..., Any]]:
    """The launchers of the ops that a path runs in another way than their own."""
    two = in_turn(_score_select_overlapped, _gather_sequence_overlapped) if path.overlap else in_turn(*PLAIN)
    found: dict[str, Callable[..., Any]] = {"prune_static": two}
    if path.overlap:
        found |= {"score_select": _score_select_overlapped, "gather_sequence": _gather_sequence_overlapped}
    if path.launches == 1:
        found["prune_static"] = _one_launch_or(two)
    return found


def can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _score_select_overlapped(embeds: torch.Tensor, *rest: Any) -> Any:
    return _score_select_triton(embeds, *rest, overlap=can_overlap(embeds.device))


def _gather_sequence_overlapped(embeds: torch.Tensor, *rest: Any) -> Any:
    return _gather_sequence_triton(embeds, *rest, overlap=can_overlap(embeds.device))


def _one_launch_or(two: Callable[..., Any]) -> Callable[..., Any]:
    """One launch where there is something to score and to copy, else ``two``."""

    def run(*args: Any) -> Any:
        tokens, moving, capacity, given, told = args[:5], args[5:12], args[10], args[12:13], args[13:]
        if capacity == 0 or (given and given[0] is not None):
            return two(*args)
        (*results, _, own), moved = prune_in_one_launch(tokens, *moving, *told)
        return (*results, *moved, own)

    return run


PLAIN = (_score_select_triton, _gather_sequence_triton)
