"""Tokens chosen as a set: each kernel at the sizes of LLaVA-1.5 and LLaVA-NeXT, and at an odd one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import Case, Kernel

from asymvlm_kernels.prefill.greedy import dpp, farthest, similar

Launch = functools.partial[object]
KERNELS = {
    "_nearest_points_kernel": Kernel(wide_loads=True, sampled=()),
    "_farthest_points_kernel": Kernel(wide_loads=True, sampled=()),
    "_dpp_map_kernel": Kernel(wide_loads=True, wide_stores=True, sampled=()),
    "_drop_similar_kernel": Kernel(sampled=()),
}


def square(N: int) -> torch.Tensor:
    """A matrix that takes no memory: nothing reads it."""
    return torch.empty(1, N, N)


def mask(N: int) -> torch.Tensor:
    return torch.empty(1, N, dtype=torch.bool)


COUNTS = torch.empty(1, dtype=torch.int64)


def farthest_call(N: int) -> Launch:
    return functools.partial(farthest._farthest_points_triton, square(N), mask(N), COUNTS)


def dpp_call(N: int) -> Launch:
    return functools.partial(dpp._dpp_map_triton, square(N), mask(N), COUNTS, N // 2)


def drop_call(N: int) -> Launch:
    order = torch.empty(1, N, dtype=torch.int64)
    return functools.partial(similar._drop_similar_triton, square(N), order, COUNTS)


def cases() -> Iterator[Case]:
    for N in (576, 2880, 729, 8192):
        wide = N % 4 == 0
        yield Case(f"farthest points {N}", farthest_call(N), wide=wide)
        if N < 8192:
            yield Case(f"dpp {N}", dpp_call(N), wide=wide)
            yield Case(f"drop similar {N}", drop_call(N), wide=wide)
