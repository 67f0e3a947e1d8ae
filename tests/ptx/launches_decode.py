"""Small launches of the decode kernels, beside their references."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from check import Emulated, Launch, close, same

from asymvlm_kernels.decode import attend, moves, reference, score

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ATTEND = ("_attend_slots_kernel", "_merge_parts_kernel")
ROUNDING = {BF16: 1e-2, FP16: 2e-3, FP32: 2e-6}
Heads = tuple[int, int, int]  # H, G, D


def tensors(heads: Heads, dtype: torch.dtype, S: int, Q: int, *, slots: bool, ragged: bool) -> tuple[Any, ...]:
    """q, k, v of a ``(1, G, S, D)`` cache, lengths, left padding, places of slots and rows. NaN where nobody looks."""
    (H, G, D), generator = heads, torch.Generator().manual_seed(S)
    q = torch.randn(1, Q, H, D, generator=generator).to(dtype)
    k, v = (torch.randn(1, G, S, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    lengths, leftpad = (torch.tensor([number], dtype=torch.int32) for number in (S - 7, 3))
    places = None, None
    if slots:
        slot_pos = torch.randperm(S, generator=generator)[None].to(torch.int32)
        slot_pos[0, 20:30] = -1
        places = slot_pos, S + torch.arange(Q)[None]
    k[:, 25 if slots else 1] = v[:, 24 if slots else 1] = float("nan") if slots or ragged else 1.0
    return q, k, v, *((lengths, leftpad) if ragged else (None, None)), *places


def check_attend(
    heads: Heads,
    dtype: torch.dtype,
    emulated: Emulated,
    *,
    S: int = 150,
    Q: int = 1,
    slots: bool = False,
    ragged: bool = False,
    softcap: float = 0.0,
    left: int = -1,
    splits: int = 2,
    scores: bool = True,
) -> None:
    given = tensors(heads, dtype, S, Q, slots=slots, ragged=ragged)
    arguments = (*given, 0.1, left, -1, softcap, splits, not scores, int(scores))
    with emulated():
        got = attend._attend_slots_triton(*arguments)
    want = reference.attend_slots(*arguments)
    close(got[0], want[0], ROUNDING[dtype], "output")
    close(got[1], want[1], 2e-5, "log of the sum")
    close(got[2], want[2], 2e-5, "scores")


def check_score(heads: Heads, dtype: torch.dtype, emulated: Emulated, *, slots: bool = False) -> None:
    q, k, v, *slot = tensors(heads, dtype, 150, 1, slots=slots, ragged=True)
    lse = reference.attend_slots(q, k, v, *slot, 0.1, -1, -1, 0.0, 1, True, 0)[1]
    arguments = (q, k, lse, *slot, 0.1, -1, -1, 0.0, 1)
    with emulated():
        got = score._score_from_lse_triton(*arguments)
    close(got, reference.score_from_lse(*arguments), 2e-5, "scores")


def check_moves(heads: Heads, dtype: torch.dtype, emulated: Emulated) -> None:
    (_, G, D), generator = heads, torch.Generator().manual_seed(0)
    keep = torch.rand(2, 90, generator=generator) > 0.3
    want_plan = reference.plan_moves(keep, 45)
    layers = [torch.randn(2, G, 90, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)]
    want = [layer.clone(memory_format=torch.preserve_format) for layer in layers]
    reference.move_slots_(*want_plan, want)
    with emulated(also=layers):
        plan = moves._plan_moves_triton(keep, 45)
        moves._move_slots_triton(*plan, layers)
    same(plan, want_plan, "plan")
    same(layers, want, "layers")


def launches() -> Iterator[Launch]:
    part = functools.partial
    gemma, phi, qwen = (4, 2, 256), (2, 2, 96), (7, 1, 128)  # as in tests/static, of fewer heads
    yield Launch("attend plain", ATTEND, part(check_attend, gemma, BF16, scores=False), (80, 90))
    yield Launch("attend scores", ATTEND, part(check_attend, gemma, BF16))
    yield Launch("attend slots", ATTEND, part(check_attend, gemma, BF16, slots=True))
    yield Launch("attend 16 rows", ATTEND, part(check_attend, gemma, BF16, slots=True, Q=16))
    yield Launch("attend width 96", ATTEND, part(check_attend, phi, FP16, ragged=True, softcap=50.0), (90,))
    yield Launch("attend 64 rows", ATTEND, part(check_attend, qwen, BF16, slots=True, Q=64, softcap=50.0))
    yield Launch("attend window", ATTEND, part(check_attend, qwen, BF16, ragged=True, Q=9, left=64, S=300))
    yield Launch("attend float32", ATTEND, part(check_attend, qwen, FP32, slots=True, S=70))
    yield Launch("attend odd", ATTEND, part(check_attend, (7, 1, 250), BF16, slots=True))
    lse = ("_score_from_lse_kernel",)
    yield Launch("score from lse", lse, part(check_score, gemma, BF16, slots=True), (80, 90))
    yield Launch("score from lse odd", lse, part(check_score, (3, 1, 70), FP16))
    moved = ("_plan_moves_kernel", "_move_slots_kernel")
    yield Launch("moves", moved, part(check_moves, gemma, BF16), (80, 90))
    yield Launch("moves odd", moved, part(check_moves, (3, 1, 35), BF16))
