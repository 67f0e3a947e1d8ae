"""Small launches of the column sums of attention, beside their reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from check import Emulated, Launch, close

from asymvlm_kernels.decode import column_sums, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Heads = tuple[int, int, int]  # H, G, D


def check(
    heads: Heads,
    dtype: torch.dtype,
    emulated: Emulated,
    *,
    S: int = 80,
    slots: bool = False,
    softcap: float = 0.0,
    left: int = -1,
    behind: bool = False,
) -> None:
    """As many queries as keys, the first two no query. ``behind``: the sums of the queries are given."""
    (H, G, D), generator = heads, torch.Generator().manual_seed(S)
    q, k = (torch.randn(1, n, S, D, generator=generator).to(dtype).transpose(1, 2) for n in (H, G))
    q_pos = torch.arange(S, dtype=torch.int32)[None].clone()
    q_pos[0, :2] = -1
    slot_pos = None
    if slots:
        slot_pos = torch.randperm(S, generator=generator)[None].to(torch.int32)
        slot_pos[0, 20:30] = -1
        k[:, 25] = float("nan")
    lse = None
    if behind:
        place = torch.arange(S)[None] if slot_pos is None else slot_pos
        seen = reference.valid_slots(S, S, None, None, place, q_pos, left, 0, q.device)
        lse = reference.scaled_logits(q, k, 0.1, softcap, seen).logsumexp(-1).view(1, H, S)
    arguments = (q, k, lse, q_pos, slot_pos, 0.1, left, softcap)
    with emulated():
        got = column_sums._attention_column_sums_triton(*arguments)
    close(got, reference.attention_column_sums(*arguments), 2e-5, "sums")


def launches() -> Iterator[Launch]:
    part, both = functools.partial, ("_query_sums_kernel", "_column_sums_kernel")
    yield Launch("column sums", both, part(check, (7, 1, 128), BF16), (90,))
    yield Launch("column sums slots", both, part(check, (4, 2, 256), BF16, slots=True))
    yield Launch("column sums capped", both, part(check, (2, 2, 96), FP16, softcap=50.0, left=20))
    yield Launch("column sums float32", both, part(check, (7, 1, 128), FP32, S=40, slots=True))
    yield Launch("column sums odd", both, part(check, (3, 1, 70), FP16, S=45))
    yield Launch("column sums behind", both[1:], part(check, (7, 1, 128), BF16, slots=True, left=30, behind=True))
