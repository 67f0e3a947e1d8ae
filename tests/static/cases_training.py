"""Key-bias attention, forward and backward, in every configuration that ships."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import Case, Kernel

from asymvlm_kernels.training import attention

Launch = functools.partial[object]
KERNELS = {
    "_key_bias_attention_kernel": Kernel(wide_loads=True, multiplies=True),
    "_key_bias_delta_kernel": Kernel(wide_loads=True),
    "_key_bias_grad_key_kernel": Kernel(wide_loads=True, multiplies=True, small_tiles=True),
    "_key_bias_grad_query_kernel": Kernel(wide_loads=True, multiplies=True, small_tiles=True),
}
B, S, H, G = 2, 2501, 32, 8


def inputs(D: int, dtype: torch.dtype, S: int = S) -> tuple[torch.Tensor, ...]:
    """q, k and v as a decoder makes them, heads before places in memory, and the bias."""
    q, *kv = (torch.empty(B, heads, S, D, dtype=dtype).transpose(1, 2) for heads in (H, G, G))
    return q, *kv, torch.empty(B, S)


def forward_call(D: int, dtype: torch.dtype, S: int = S) -> Launch:
    return functools.partial(attention._key_bias_attention_triton, *inputs(D, dtype, S), D**-0.5)


def grad_call(D: int, dtype: torch.dtype, S: int = S) -> Launch:
    grad, lse = torch.empty(B, S, H, D, dtype=dtype), torch.empty(B, H, S)
    return functools.partial(attention._key_bias_attention_grad_triton, grad, *inputs(D, dtype, S), grad, lse, D**-0.5)


def cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    for D, dtype in ((64, bf16), (96, bf16), (256, bf16), (128, torch.float32)):  # a head_dim of each configuration
        name = f"{str(dtype).removeprefix('torch.')} {D}"
        yield Case(f"key-bias attention {name}", forward_call(D, dtype), dtype, wide=True)
        yield Case(f"key-bias gradient {name}", grad_call(D, dtype), dtype, wide=True)
