"""Column sums of attention: the configurations that ship."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import Case, Kernel

from asymvlm_kernels.decode import column_sums

Launch = functools.partial[object]
KERNELS = {
    "_query_sums_kernel": Kernel(wide_copies=True, multiplies=True, small_tiles=True, sampled=(90,)),
    "_column_sums_kernel": Kernel(wide_copies=True, multiplies=True, small_tiles=True, sampled=(90,)),
}
LLAVA_NEXT = 2880  # tokens of its five tiles


def call(heads: tuple[int, int, int], dtype: torch.dtype, *, slots: bool = False, softcap: float = 0.0) -> Launch:
    """Heads before places in memory, as in a cache; as many queries as keys."""
    (H, G, D), S = heads, LLAVA_NEXT
    q, k = (torch.empty(1, n, S, D, dtype=dtype).transpose(1, 2) for n in (H, G))
    places = torch.empty(1, S, dtype=torch.int32)
    slot_pos = places if slots else None
    return functools.partial(column_sums._attention_column_sums_triton, q, k, None, places, slot_pos, 0.1, -1, softcap)


def cases() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield Case("column sums", call((28, 4, 128), bf16), bf16, wide=True)
    yield Case("column sums slots", call((16, 8, 256), bf16, slots=True), bf16, wide=True)
    yield Case("column sums capped", call((32, 32, 96), fp16, softcap=50.0), fp16, wide=True)
    yield Case("column sums float32", call((28, 4, 128), fp32, slots=True), fp32, wide=True)
    yield Case("column sums odd", call((3, 1, 70), fp16), fp16)
