"""Long queries: the output comes from a kernel made for them, the scores from ours. The one place that chooses it.

A prompt of thousands of rows is bound by arithmetic, which FlashAttention and PyTorch's attention are written for. Of
its rows only the last few are scored, and those are a decode step: `score_from_lse` where the base hands out its
logsumexp, `attend_slots` on these rows alone where it does not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from asymvlm_kernels.dispatch import requested_backend

LONG = 64  # query rows; below, the key heads' rows fit one or two tiles of our kernel
HALVES = (torch.float16, torch.bfloat16)

Result = tuple[torch.Tensor, torch.Tensor | None]  # output, logsumexp where there is one


def long_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int, right: int, softcap: float, lse: bool
) -> Result | None:
    """The output of a base kernel, or None: for our own to do. A backend asked for by name is obeyed."""
    S = k.shape[1]
    if q.shape[1] < LONG or S == 0 or requested_backend() != "auto":
        return None
    flash = flash_attn_for(q)
    if flash is not None:
        out, sums, _ = flash(q, k, v, 0.0, scale, right == 0, (left, right), softcap, return_attn_probs=True)
        return out, sums
    half = q.dtype in HALVES
    square = right == 0 and q.shape[1] == S  # PyTorch aligns a causal mask to the top left corner
    if lse or softcap > 0 or 0 <= left < S or not (square or right < 0) or not (half or q.device.type == "cpu"):
        return None
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[2] != k.shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, keys, values, is_causal=square, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous(), None


def flash_attn_for(q: torch.Tensor) -> Callable[..., Any] | None:
    """``flash_attn_func`` of the flash-attn package, if it is installed and takes such queries."""
    able = q.device.type == "cuda" and q.dtype in HALVES and q.shape[3] % 8 == 0
    return _flash_attn() if able else None


@functools.cache
def _flash_attn() -> Callable[..., Any] | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError):  # built for another torch, or version 4, which has other arguments
        return None
    return function
