"""Small launches of the greedy choices, beside their references: the same tokens, whatever decides."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from check import Emulated, Launch, same

from asymvlm_kernels.prefill.greedy import dpp, farthest, reference, similar

FARTHEST = ("_nearest_points_kernel", "_farthest_points_kernel")


def inputs(N: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines of two samples of ``rank``, with ties and a NaN; a mask; how many are wanted."""
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(2, N, rank, generator=generator)
    x[:, N // 2 : N // 2 + 5] = x[:, :5]
    x[1, 7] = float("nan")
    mask = torch.rand(2, N, generator=generator) < 0.8
    return reference.cosine_matrix(x, mask), mask, torch.tensor([11, 5])


def check_farthest(N: int, emulated: Emulated) -> None:
    arguments = inputs(N, 9)
    with emulated():
        got = farthest._farthest_points_triton(*arguments)
    same(got, reference.farthest_points(*arguments), "chosen")


def check_dpp(N: int, emulated: Emulated) -> None:
    """Of rank 4: behind four choices gains are noise, whose every bit decides; then they are none."""
    arguments = (*inputs(N, 4), 20)
    with emulated():
        got = dpp._dpp_map_triton(*arguments)
    same(got, reference.dpp_map(*arguments), "chosen")


def check_drop(N: int, emulated: Emulated) -> None:
    similarity, mask, counts = inputs(N, 9)
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(2)])
    arguments = similarity, order.masked_fill(~mask, -1), counts
    with emulated():
        got = similar._drop_similar_triton(*arguments)
    same(got, reference.drop_similar(*arguments), "left")


def launches() -> Iterator[Launch]:
    part = functools.partial
    for N in (64, 150, 45):  # wide rows; more than one block of columns; odd rows
        yield Launch(f"farthest points {N}", FARTHEST, part(check_farthest, N))
        yield Launch(f"dpp {N}", ("_dpp_map_kernel",), part(check_dpp, N))
        yield Launch(f"drop similar {N}", ("_drop_similar_kernel",), part(check_drop, N))
