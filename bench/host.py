"""The host's share of a call, measured without a GPU: what Python does until the driver would launch.

    python -m bench.host --file bench/results/<machine>/<day>-host.json

Triton's launch runs up to the driver, which does nothing (`bench.harness.fake_gpu`), from CPU tensors. So no figure has
the allocator of CUDA in it, nor the driver, nor Triton's extraction of arguments in C. ``plain`` is the same call with
every kernel launched in Triton's ordinary way.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is decorated

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from asymvlm_kernels import UniformBudget, flash_attn_with_kvcache, prune_sequence, use_backend
from bench.harness.fake_gpu import fake_gpu

ROUNDS, CALLS = 21, 200


def prune_case(B: int = 1, S: int = 1024, D: int = 256) -> Callable[[], Any]:
    embeds = torch.zeros(B, S, D, dtype=torch.bfloat16)
    vision = torch.arange(S).expand(B, S) < S - 40
    vision, text = vision.contiguous(), ~vision
    weight, ids = torch.ones(D), torch.zeros(B, S, dtype=torch.int64)
    positions = torch.zeros(3, B, S, dtype=torch.int64)
    carry, pads = {"input_ids": ids, "position_ids": positions}, {"input_ids": -1}
    budget = UniformBudget(0.3)
    return lambda: prune_sequence(embeds, vision, text, weight, budget, carry=carry, carry_pad=pads, static=True)


def bare_prune_case(B: int = 1, S: int = 1024, D: int = 256) -> Callable[[], Any]:
    embeds = torch.zeros(B, S, D, dtype=torch.bfloat16)
    vision = torch.arange(S).expand(B, S) < S - 40
    vision, text = vision.contiguous(), ~vision
    budget = UniformBudget(0.3)
    return lambda: prune_sequence(embeds, vision, text, None, budget, static=True)


def decode_case(B: int = 1, S: int = 2048, H: int = 32, G: int = 8, D: int = 128) -> Callable[[], Any]:
    q = torch.zeros(B, 1, H, D, dtype=torch.bfloat16)
    k, v = (torch.zeros(B, G, S, D, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    lengths = torch.full((B,), S, dtype=torch.int32)
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, return_scores=True)


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "prune_sequence(static=True), ids and positions carried": prune_case,
    "prune_sequence(static=True), nothing carried": bare_prune_case,
    "flash_attn_with_kvcache(return_scores=True)": decode_case,
}


def round_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds a call, over ``calls`` of them."""
    started = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - started) / calls / 1e3


if __name__ == "__main__":
    with fake_gpu(), use_backend("triton"), torch.no_grad():
        for name, make in CASES.items():
            call = make()
            for _ in range(20):
                call()
            t = sorted(round_us(call, CALLS) for _ in range(ROUNDS))
            print(name, t[0], statistics.median(t))
