"""Tile sizes of key-bias attention.

Chosen offline among few, for code that spills nothing on five architectures (Triton 3.6 and 3.9). No GPU has timed
them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of ``block_m`` queries by ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def attention_config(D: int, dtype: torch.dtype, kernel: str) -> AttentionConfig:
    """``kernel`` is ``"forward"``, ``"key"`` (gradients of keys, values and bias) or ``"query"``."""
    if dtype == torch.float32:  # FMA: 32 x 32 spill 3400 words forward at head_dim 256, 185 in "key" at 128 (sm_89)
        return AttentionConfig(16, 16 if D > 128 and kernel != "forward" else 32, num_warps=8, num_stages=1)
    if D <= 64:  # 64 x 64 spill backward on sm_80, 89 and 120
        return AttentionConfig(64, 64 if kernel == "forward" else 32, num_warps=4, num_stages=2)
    if D <= 128:  # 4 warps would need more than 255 registers; two stages of 64 x 64 spill backward (Triton 3.6)
        return AttentionConfig(64, 32 if kernel == "key" else 64, num_warps=8, num_stages=1 if kernel == "query" else 2)
    return AttentionConfig(64 if kernel == "forward" else 32, 32, num_warps=8, num_stages=1)  # 64 x 32 spill on sm_90
