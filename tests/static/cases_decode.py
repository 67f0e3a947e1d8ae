"""The decode kernels: what each does, and the configurations and dtypes that ship."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import Case, Kernel

from asymvlm_kernels.decode import attend, moves, reference, score

Launch = functools.partial[object]
KERNELS = {
    "_attend_slots_kernel": Kernel(wide_copies=True, multiplies=True, small_tiles=True),
    "_merge_parts_kernel": Kernel(wide_loads=True),
    "_score_from_lse_kernel": Kernel(wide_copies=True, multiplies=True, small_tiles=True),
    "_plan_moves_kernel": Kernel(),
    "_move_slots_kernel": Kernel(wide_loads=True, wide_stores=True, only_wide_loads=True),
}
GEMMA_3, PHI_3, QWEN_2 = (16, 8, 256), (32, 32, 96), (28, 4, 128)  # H, G, D


def tensors(
    heads: tuple[int, int, int], dtype: torch.dtype, S: int, Q: int, B: int, slots: bool, ragged: bool
) -> tuple[torch.Tensor | None, ...]:
    """q, k, v of a ``(B, G, S, D)`` cache, lengths, left padding, positions of slots and rows."""
    H, G, D = heads
    q, cache = torch.empty(B, Q, H, D, dtype=dtype), torch.empty(B, G, S, D, dtype=dtype).transpose(1, 2)
    numbers = torch.empty(B, dtype=torch.int32) if ragged else None
    places = (torch.empty(B, S, dtype=torch.int32), torch.empty(B, Q, dtype=torch.int64)) if slots else (None, None)
    return q, cache, cache, numbers, numbers, *places


def attend_call(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    S: int = 8192,
    Q: int = 1,
    B: int = 1,
    slots: bool = False,
    ragged: bool = False,
    softcap: float = 0.0,
    left: int = -1,
    scores: bool = True,
) -> Launch:
    arguments = tensors(heads, dtype, S, Q, B, slots, ragged)
    return functools.partial(
        attend._attend_slots_triton, *arguments, 0.1, left, -1, softcap, 0, not scores, int(scores)
    )


def score_call(heads: tuple[int, int, int], dtype: torch.dtype, *, S: int = 8192, slots: bool = False) -> Launch:
    q, k, _, *slot = tensors(heads, dtype, S, 1, 1, slots, True)
    lse = torch.empty(1, heads[0], 1)
    return functools.partial(score._score_from_lse_triton, q, k, lse, *slot, 0.1, -1, -1, 0.0, 1)


def plan_call(S: int, B: int = 1) -> Launch:
    return functools.partial(moves._plan_moves_triton, torch.empty(B, S, dtype=torch.bool), S // 2)


def move_call(heads: tuple[int, int, int], dtype: torch.dtype, *, S: int = 64, B: int = 1, M: int = 9) -> Launch:
    _, G, D = heads
    layers = [torch.empty(B, G, S, D, dtype=dtype).transpose(1, 2) for _ in range(4)]
    source, target = reference.plan_moves(torch.ones(B, S, dtype=torch.bool), M)
    return functools.partial(moves._move_slots_triton, source, target, layers)


def cases() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield Case("attend plain", attend_call(GEMMA_3, bf16, scores=False), bf16, wide=True)
    yield Case("attend scores", attend_call(GEMMA_3, bf16), bf16, wide=True)
    yield Case("attend slots", attend_call(GEMMA_3, bf16, slots=True), bf16, wide=True)
    yield Case("attend 16 rows", attend_call(GEMMA_3, bf16, slots=True, Q=16), bf16, wide=True)
    yield Case("attend width 96", attend_call(PHI_3, fp16, ragged=True, softcap=50.0), fp16, wide=True)
    yield Case("attend 64 rows", attend_call(QWEN_2, bf16, slots=True, Q=64, softcap=50.0), bf16, wide=True)
    yield Case("attend float32", attend_call(QWEN_2, fp32, slots=True), fp32, wide=True)
    yield Case("attend odd", attend_call((28, 4, 250), bf16, slots=True), bf16)
    yield Case("score from lse", score_call(GEMMA_3, bf16, slots=True), bf16, wide=True)
    yield Case("score from lse odd", score_call((3, 1, 70), fp16), fp16)
    yield Case("plan", plan_call(8192))
    yield Case("move", move_call(GEMMA_3, bf16), wide=True)
    yield Case("move odd", move_call((3, 1, 35), bf16))
