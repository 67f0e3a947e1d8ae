"""Counts that a budget takes from a sample's own scores."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import Case, Kernel

from asymvlm_kernels.prefill import relative

KERNELS = {"_relative_counts_kernel": Kernel(rounds_float64_twice=True)}


def relative_call(N: int) -> functools.partial[object]:
    scores, mask = torch.empty(1, N), torch.empty(1, N, dtype=torch.bool)
    return functools.partial(relative._relative_counts_triton, scores, mask, 0.4, 50_000, 1_000_000)


def cases() -> Iterator[Case]:
    for N in (256, 2500, 16384, 65536):
        yield Case(f"relative {N}", relative_call(N))
