"""Device memory that lives for one call of `prune_sequence`, and counters that live on."""

from __future__ import annotations

import torch

from asymvlm_kernels._triton import triton
from asymvlm_kernels.launch import empty, held
from asymvlm_kernels.prefill.prune import captured
from asymvlm_kernels.prefill.prune.tokens import Scratch
from asymvlm_kernels.tuning.prune import RankConfig, ScoreSelectConfig, Split

BINS = 2048  # of the histogram of a long row

_counters: dict[tuple[torch.device, int, str], torch.Tensor] = {}


def scratch_of(
    B: int,
    S: int,
    config: ScoreSelectConfig,
    split: Split,
    rank: RankConfig,
    device: torch.device,
    *,
    spreads: bool = False,
) -> Scratch:
    tiles = triton.cdiv(S, config.block_n)
    slot = split.rounds * config.block_n * config.block_l + 3 * config.block_n
    sizes = [
        B * tiles * split.parts * slot,
        B * split.rounds * split.parts * config.block_l,
        B * tiles * config.block_n,
        B * tiles * config.block_n * spreads,
        B * rank.block_s if rank.chunked else 0,
    ]
    parts, squares, *integers = empty((sum(sizes),), dtype=torch.float32, device=device).split(sizes)
    keys, spread_keys, lists = (piece.view(torch.int32) for piece in integers)
    counters = held(zeroed_counters, device, B * (tiles + 1 + BINS * rank.chunked))
    return Scratch(parts, squares, keys, lists, counters, spread_keys if spreads else None)


def zeroed_counters(device: torch.device, size: int, use: str = "tiles") -> torch.Tensor:
    """At least ``size`` int32 zeros that each kernel leaves zero again: kept for each stream, so that none is launched.

    One kernel may hold several, each for a ``use`` of its own.

    A captured call gets its own: a CUDA graph may be replayed beside other work, on any stream (see `captured`).
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            found = captured.take(device, size)
            return torch.zeros(size, dtype=torch.int32, device=device) if found is None else found
        captured.refill(device)
        stream = torch.cuda.current_stream(device).cuda_stream
    held = _counters.get((device, stream, use))
    if held is None or held.numel() < size:
        held = torch.zeros(max(1 << (size - 1).bit_length(), 1024), dtype=torch.int32, device=device)
        _counters[device, stream, use] = held
    return held
