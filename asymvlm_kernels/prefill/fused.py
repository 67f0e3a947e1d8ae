"""`prune_sequence` in two launches without a host synchronisation: registered ops, launchers and their reference.

`score_select` ends with the kept places of each sample, `gather_sequence` moves every per-token tensor. Only a caller
who wants the shortest sequence reads the lengths in between.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence

import torch

from asymvlm_kernels._triton import triton
from asymvlm_kernels.budget import (
    Budget,
    LinearBudget,
    ScoreBudget,
    ThresholdBudget,
    UniformBudget,
    keep_counts,
    to_millionths,
)
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.fused_gather import _gather_sequence_kernel, encoded
from asymvlm_kernels.prefill.fused_score import _score_select_kernel
from asymvlm_kernels.prefill.gather import WORDS, _bits
from asymvlm_kernels.tuning.fused import gather_sequence_config, rank_config, score_select_config
from asymvlm_kernels.tuning.prefill import architecture, row_vector

LONGEST = 65536  # places of a sequence
MOST_CARRIES = 8
CARRY_ROWS = 512  # rows of a narrow tensor that one program moves

_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
ScoreSelect = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
GatherSequence = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def encode_budget(budget: Budget | ScoreBudget) -> tuple[list[int], list[float]] | None:
    """Three ratios in millionths and two gaps, or the five numbers of a linear budget; None for any other."""
    if type(budget) is UniformBudget:
        return [to_millionths(budget.ratio)] * 3, [0.0, 0.0]
    if type(budget) is ThresholdBudget:
        ratios = [to_millionths(ratio) for ratio in (budget.conservative, budget.moderate, budget.aggressive)]
        return ratios, [budget.gap_low, budget.gap_high]
    if type(budget) is LinearBudget:
        return [], [budget.target, budget.slope, budget.mean_gap, budget.minimum, budget.maximum]
    return None


class _EncodedBudget:
    def __init__(self, ratios: Sequence[int], numbers: Sequence[float]) -> None:
        self.ratios, self.numbers = ratios, numbers

    @property
    def max_ratio(self) -> float:
        return max(self.ratios) / 1e6 if self.ratios else self.numbers[4]

    def keep_ratio(self, gap: torch.Tensor) -> torch.Tensor:
        return self.millionths(gap).to(torch.float64) / 1e6

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        if not self.ratios:
            return LinearBudget(*self.numbers).millionths(gap)
        low, high = (torch.tensor(number, dtype=torch.float32, device=gap.device) for number in self.numbers)
        return torch.tensor(self.ratios, device=gap.device)[(gap >= low).long() + (gap >= high).long()]


def _score_select_reference(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
) -> ScoreSelect:
    # reads the longest text on the host, which synchronises a CUDA device: the fallback, not the path of a GPU
    prunable, must_stay, text = reference.token_roles(vision_mask, text_mask, protect)
    text_lengths = text.sum(-1)
    text_index = reference.compact(text, int(text_lengths.max()) if text_lengths.numel() else 0)
    rows = reference.gather_rows(embeds, text_index, 0)
    scores = reference.score_tokens(embeds, rows, weight, prunable, text_index >= 0)
    gap = reference.importance_gap(scores, prunable)
    num_tokens = prunable.sum(-1)
    counts = keep_counts(gap, num_tokens, _EncodedBudget(ratios, numbers))
    counts = torch.where(text_lengths > 0, counts, num_tokens.to(torch.int32))
    stay = must_stay.sum(-1).to(torch.int32)
    counts = counts.minimum((capacity - stay).clamp_min(0))
    lengths = (stay + counts).clamp_max(capacity)
    rank = scores.clamp_max(torch.finfo(torch.float32).max).masked_fill(must_stay, float("inf"))
    order = reference.select_tokens(rank, lengths, prunable | must_stay, embeds.shape[1])
    return scores, gap, counts, lengths, order.to(torch.int32)


def _score_select_triton(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
) -> ScoreSelect:
    B, S, D = embeds.shape
    outputs = _score_select_fake(embeds, vision_mask, text_mask, protect, weight, ratios, numbers, capacity)
    scores, gap, counts, lengths, order = outputs
    if B == 0 or S == 0:
        gap.fill_(float("nan")), counts.zero_(), lengths.zero_()
        return outputs
    vector = row_vector(embeds)
    config = score_select_config(D, embeds.dtype, vector, architecture(embeds.device))
    rank = rank_config(S)
    tiles = triton.cdiv(S, config.block_n)
    keys, parts, squares = _scratch(B, S, tiles, config.splits, config.block_n, config.block_l, embeds.device)
    _score_select_kernel[(tiles * config.splits, B)](
        embeds,
        weight,
        vision_mask,
        text_mask,
        protect,
        scores,
        gap,
        counts,
        lengths,
        order,
        keys,
        parts,
        squares,
        zeroed_counters(embeds.device, B * (tiles + 1)),
        *embeds.stride(),
        0 if weight is None else weight.stride(0),
        *vision_mask.stride(),
        *text_mask.stride(),
        *((0, 0) if protect is None else protect.stride()),
        S,
        capacity,
        int(not ratios),
        *(ratios or (0, 0, 0)),
        *_number_bits(numbers, rounded=bool(ratios)),
        EPSILON=reference.EPSILON,
        D=D,
        BLOCK_N=config.block_n,
        BLOCK_L=config.block_l,
        BLOCK_D=config.block_d,
        SPLITS=config.splits,
        VECTOR=vector,
        SPLIT=embeds.dtype != torch.float32,
        LIFT=embeds.dtype == torch.float16,
        BLOCK_S=rank.block_s,
        BLOCK_K=64 * config.num_warps,  # 2 places a thread: with 8 the scan spills
        CHUNKED=rank.chunked,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return outputs


def _scratch(
    B: int, S: int, tiles: int, splits: int, block_n: int, block_l: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank keys, partial products with partial ``||v||^2``, and partial ``||t||^2``: pieces of one allocation."""
    sizes = (B * tiles * splits * block_n * (block_l + 1), B * splits * block_l, B * S)
    whole = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    parts, squares, keys = whole.split(sizes)  # the last one needs no alignment
    return keys.view(torch.int32), parts, squares


def _number_bits(numbers: Sequence[float], rounded: bool) -> list[int]:
    """Float64 numbers as integers: a Python float reaches a kernel as fp32. ``rounded``: to the fp32 of a gap first."""
    wide = [ctypes.c_float(number).value if rounded else number for number in numbers]
    return [struct.unpack("<q", struct.pack("<d", number))[0] for number in [*wide, 0.0, 0.0, 0.0][:5]]


def zeroed_counters(device: torch.device, size: int) -> torch.Tensor:
    """At least ``size`` int32 zeros that each kernel leaves zero again: kept for each stream, so that none is launched.

    A CUDA graph gets its own, zeroed by the graph: it may be replayed beside other work, on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    held = _counters.get((device, stream))
    if held is None or held.numel() < size:
        held = torch.zeros(max(1 << (size - 1).bit_length(), 1024), dtype=torch.int32, device=device)
        _counters[device, stream] = held
    return held


def _score_select_fake(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
) -> ScoreSelect:
    B, S, _ = embeds.shape
    scores = torch.empty((B, S), dtype=torch.float32, device=embeds.device)
    gap = torch.empty((B,), dtype=torch.float32, device=embeds.device)
    counts, lengths = (torch.empty((B,), dtype=torch.int32, device=embeds.device) for _ in range(2))
    return scores, gap, counts, lengths, torch.empty((B, S), dtype=torch.int32, device=embeds.device)


def _gather_sequence_reference(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> GatherSequence:
    rank = torch.arange(capacity, device=order.device).expand(order.shape[0], capacity)
    rank = rank - (capacity - lengths[:, None].long()) if left else rank
    real = (rank >= 0) & (rank < lengths[:, None])
    index = order.long().gather(-1, rank.clamp(0, max(order.shape[1] - 1, 0))) if order.shape[1] else rank
    index = index.masked_fill(~real, -1)
    outs = []
    for tensor, pad, is_stacked in zip(carry, pads, stacked, strict=True):
        out = reference.gather_rows(tensor.permute(1, 2, 0) if is_stacked else tensor, index, pad)
        outs.append(out.permute(2, 0, 1).contiguous() if is_stacked else out)
    return reference.gather_rows(embeds, index, 0), index, outs


def _gather_sequence_triton(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> GatherSequence:
    outputs = _gather_sequence_fake(embeds, order, lengths, carry, pads, stacked, capacity, left)
    out, index, outs = outputs
    (B, S, D), K = embeds.shape, capacity
    if B == 0 or K == 0:
        return outputs
    rows = embeds.view(WORDS[embeds.itemsize])
    words = [tensor.view(WORDS[tensor.itemsize]) for tensor in carry]
    words = [  # (B, S, X); copies where the trailing axes are not one axis in memory
        word.permute(1, 2, 0) if is_stacked else word.reshape(B, S, math.prod(word.shape[2:]))
        for word, is_stacked in zip(words, stacked, strict=True)
    ]
    vector = row_vector(rows)
    config = gather_sequence_config(D, embeds.itemsize, vector)
    programs = B * triton.cdiv(K, config.block_k) * triton.cdiv(D, config.block_d)
    programs += B * triton.cdiv(K, CARRY_ROWS) * (1 + len(words))
    _gather_sequence_kernel[(programs,)](
        rows,
        order,
        lengths,
        out.view(rows.dtype),
        index,
        tuple(words),
        tuple(result.view(word.dtype) for result, word in zip(outs, words, strict=True)),
        *rows.stride(),
        tuple(encoded(word.stride(0)) for word in words),
        tuple(word.stride(1) for word in words),
        tuple(encoded(word.stride(2)) for word in words),
        tuple(_bits(pad, math.copysign(1, pad), tensor.dtype) for pad, tensor in zip(pads, carry, strict=True)),
        B,
        S,
        K,
        D=D,
        WIDTHS=tuple(word.shape[2] for word in words),
        STACKED=tuple(stacked),
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        BLOCK_C=CARRY_ROWS,
        VECTOR=vector,
        LEFT=left,
        num_warps=config.num_warps,
    )
    return outputs


def _gather_sequence_fake(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> GatherSequence:
    B, _, D = embeds.shape
    outs = [
        torch.empty(
            (tensor.shape[0], B, capacity) if is_stacked else (B, capacity, *tensor.shape[2:]),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        for tensor, is_stacked in zip(carry, stacked, strict=True)
    ]
    rows = torch.empty((B, capacity, D), dtype=embeds.dtype, device=embeds.device)
    return rows, torch.empty((B, capacity), dtype=torch.int64, device=embeds.device), outs


score_select = define_op(
    "score_select(Tensor embeds, Tensor vision_mask, Tensor text_mask, Tensor? protect, Tensor? weight, int[] ratios, "
    "float[] numbers, SymInt capacity) -> (Tensor scores, Tensor gap, Tensor counts, Tensor lengths, Tensor order)",
    reference=_score_select_reference,
    triton=_score_select_triton,
    fake=_score_select_fake,
)
gather_sequence = define_op(
    "gather_sequence(Tensor embeds, Tensor order, Tensor lengths, Tensor[] carry, Scalar[] pads, bool[] stacked, "
    "SymInt capacity, bool left) -> (Tensor out, Tensor index, Tensor[] carried)",
    reference=_gather_sequence_reference,
    triton=_gather_sequence_triton,
    fake=_gather_sequence_fake,
)
