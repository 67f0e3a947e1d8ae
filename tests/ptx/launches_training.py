"""Small launches of key-bias attention, forward and backward, beside their references."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from check import Emulated, Launch, close

from asymvlm_kernels.training import attention, reference

BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = {BF16: 2e-2, FP32: 1e-5}
FORWARD = ("_key_bias_attention_kernel",)
BACKWARD = ("_key_bias_delta_kernel", "_key_bias_grad_key_kernel", "_key_bias_grad_query_kernel")


def inputs(S: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and v, four heads a group, heads before places in memory, and a bias that hides three keys.

    As many heads at D = 64 that the builds are those of tests/static.
    """
    generator = torch.Generator().manual_seed(D)
    G = 4 if D == 64 else 1
    q, k, v = (torch.randn(1, heads, S, D, generator=generator).to(dtype).transpose(1, 2) for heads in (4 * G, G, G))
    bias = torch.randn(1, S, generator=generator)
    bias[0, :3] = float("-inf")
    return q, k, v, bias


def check_forward(S: int, D: int, dtype: torch.dtype, emulated: Emulated) -> None:
    arguments = (*inputs(S, D, dtype), D**-0.5)
    with emulated():
        got = attention._key_bias_attention_triton(*arguments)
    want = reference.key_bias_attention(*arguments)
    close(got[0], want[0], ROUNDING[dtype], "output")
    close(got[1], want[1], 2e-5, "log of the sum")


def check_backward(S: int, D: int, dtype: torch.dtype, emulated: Emulated) -> None:
    arguments = (*inputs(S, D, dtype), D**-0.5)
    out, lse = reference.key_bias_attention(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    everything = (grad, *arguments[:4], out, lse, arguments[4])
    with emulated():
        got = attention._key_bias_attention_grad_triton(*everything)
    want = reference.key_bias_attention_grad(*everything)
    for name, one, other in zip(("q", "k", "v", "bias"), got, want, strict=True):
        close(one, other, ROUNDING[dtype], f"gradient of {name}")


def launches() -> Iterator[Launch]:
    part = functools.partial
    for D, dtype in ((64, BF16), (96, BF16), (256, BF16), (128, FP32)):  # a head_dim of each configuration
        name = f"{str(dtype).removeprefix('torch.')} {D}"
        quick = (80, 90) if D == 64 else ()
        yield Launch(f"key-bias attention {name}", FORWARD, part(check_forward, 70, D, dtype), quick)
        yield Launch(f"key-bias gradient {name}", BACKWARD, part(check_backward, 70, D, dtype), quick)
