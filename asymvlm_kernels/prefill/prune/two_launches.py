"""`prune_sequence` in two launches without a host synchronisation: registered ops and launchers.

`score_select` ends with the kept places of each sample, `gather_sequence` moves every per-token tensor. Only a caller
who wants the shortest sequence reads the lengths in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from asymvlm_kernels._checks import WORDS
from asymvlm_kernels._triton import triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.gather import _bits
from asymvlm_kernels.prefill.prune import specification
from asymvlm_kernels.prefill.prune.budget_numbers import budget_arguments, encode_budget
from asymvlm_kernels.prefill.prune.gather_item import _gather_sequence_kernel, encoded
from asymvlm_kernels.prefill.prune.given_scores import select_given
from asymvlm_kernels.prefill.prune.score_item import _score_select_kernel
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.prune.scratch import scratch_of
from asymvlm_kernels.prefill.prune.specification import GatherSequence, ScoreSelect
from asymvlm_kernels.prefill.prune.tokens import Tokens, kept_of
from asymvlm_kernels.tuning.prefill import GatherConfig, architecture, processors, row_vector
from asymvlm_kernels.tuning.prune import gather_sequence_config, rank_config, score_select_config, split_of

LONGEST = 65536  # places of a sequence
MOST_CARRIES = 8
TOLD = "Tensor? lines=None, int reach=0, float share=1.0, float[] floor=[]"  # a `ScoreRule`
CARRY_ROWS = 512  # rows of a narrow tensor that one program moves

__all__ = [
    "LONGEST",
    "MOST_CARRIES",
    "GatherSequence",
    "ScoreSelect",
    "encode_budget",
    "gather_sequence",
    "score_select",
]

_score_select_reference = specification.score_select
_gather_sequence_reference = specification.gather_sequence


@remember
def _score_select_triton(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    given: torch.Tensor | None = None,
    *told: Any,
    overlap: bool = False,
) -> ScoreSelect:
    B, S, D = embeds.shape
    outputs = _score_select_fake(
        embeds, vision_mask, text_mask, protect, weight, ratios, numbers, capacity, given, *told
    )
    if B == 0 or S == 0:
        return nothing_selected(outputs)
    rule = ScoreRule(*told)
    if given is not None:
        select_given(given, (vision_mask, text_mask, protect), outputs, ratios, numbers, capacity, rule)
        return outputs
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    arguments, constants, programs = score_launch(tokens, outputs, ratios, numbers, capacity, rule)
    launch(_score_select_kernel, (programs, B), *arguments, **constants, OVERLAP=overlap)
    return outputs


def nothing_selected(outputs: ScoreSelect) -> ScoreSelect:
    """The answer for samples without a single place."""
    _, gap, counts, lengths, *_ = outputs
    gap.fill_(float("nan")), counts.zero_(), lengths.zero_()
    return outputs


def score_launch(
    tokens: tuple[Any, ...],
    outputs: ScoreSelect,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    rule: ScoreRule,
) -> tuple[list[Any], dict[str, Any], int]:
    """Arguments and constants of a kernel that runs `score_item`, and the programs of a sample."""
    embeds, vision_mask, text_mask, protect, weight = tokens
    B, S, D = embeds.shape
    vector = row_vector(embeds)
    config = score_select_config(D, embeds.dtype, vector, architecture(embeds.device))
    rank = rank_config(S)
    tiles = triton.cdiv(S, config.block_n)
    split = split_of(B * tiles, D, config, processors(embeds.device))
    arguments = [
        Tokens(*tokens)._replace(lines=rule.lines),
        kept_of(outputs),
        scratch_of(B, S, config, split, rank, embeds.device, spreads=rule.lines is not None),
        *embeds.stride(),
        0 if weight is None else weight.stride(0),
        *vision_mask.stride(),
        *text_mask.stride(),
        *((0, 0) if protect is None else protect.stride()),
        *rule.line_strides,
        S,
        split.parts,
        split.rounds,
        capacity,
        *rule.numbers,
        *budget_arguments(ratios, numbers),
    ]
    constants = {
        "EPSILON": reference.EPSILON,
        "D": D,
        "BLOCK_N": config.block_n,
        "BLOCK_L": config.block_l,
        "BLOCK_D": config.block_d,
        "VECTOR": vector,
        "HIGH_LOW": embeds.dtype != torch.float32,
        "LIFT": embeds.dtype == torch.float16,
        "BLOCK_S": rank.block_s,
        "THREADS": 32 * config.num_warps,
        "LONG": rank.chunked,
        "BY_SCORES": rule.ranks_by_scores(ratios),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": 65536 // (32 * config.num_warps) - 1,  # where ptxas chooses, it aims lower and spills
    }
    return arguments, constants, tiles * split.parts


def _score_select_fake(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    given: torch.Tensor | None = None,
    *told: Any,
) -> ScoreSelect:
    B, S, _ = embeds.shape
    scores = empty((B, S), dtype=torch.float32, device=embeds.device)
    gap = empty((B,), dtype=torch.float32, device=embeds.device)
    counts, lengths = (empty((B,), dtype=torch.int32, device=embeds.device) for _ in range(2))
    order = empty((B, S), dtype=torch.int32, device=embeds.device)
    spreads = ScoreRule(*told).lines is not None
    own = [empty((B, S), dtype=torch.float32, device=embeds.device)] if spreads else []
    return scores, gap, counts, lengths, order, own


@remember
def _gather_sequence_triton(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
    *,
    overlap: bool = False,
) -> GatherSequence:
    outputs = _gather_sequence_fake(embeds, order, lengths, carry, pads, stacked, capacity, left)
    B, _, D = embeds.shape
    if B == 0 or capacity == 0:
        return outputs
    config = gather_sequence_config(D, embeds.itemsize, row_vector(embeds))
    arguments, constants, items = gather_launch(
        embeds, order, lengths, carry, pads, stacked, capacity, left, outputs, config
    )
    constants |= {"OVERLAP": overlap, "num_warps": config.num_warps} | ({"launch_pdl": True} if overlap else {})
    launch(_gather_sequence_kernel, (B * items,), *arguments, **constants)
    return outputs


def gather_launch(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
    outputs: GatherSequence,
    config: GatherConfig,
) -> tuple[list[Any], dict[str, Any], int]:
    """Arguments and constants of a kernel that runs `gather_item`, and the items of a sample."""
    out, index, outs = outputs
    (B, S, D), K = embeds.shape, capacity
    rows = embeds.view(WORDS[embeds.itemsize])
    words = [tensor.view(WORDS[tensor.itemsize]) for tensor in carry]
    words = [  # (B, S, X); copies where the trailing axes are not one axis in memory
        word.permute(1, 2, 0) if is_stacked else word.reshape(B, S, math.prod(word.shape[2:]))
        for word, is_stacked in zip(words, stacked, strict=True)
    ]
    arguments = [
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
        tuple(
            _bits(pad, math.copysign(1, pad), tensor.dtype) for pad, tensor in zip(pads, carry)
        ),  # `alike` may add one
        B,
        S,
        K,
    ]
    constants = {
        "D": D,
        "WIDTHS": tuple(word.shape[2] for word in words),
        "STACKED": tuple(stacked),
        "ROWS": config.block_k,
        "COLUMNS": config.block_d,
        "BLOCK_C": CARRY_ROWS,
        "VECTOR": row_vector(rows),
        "LEFT": left,
    }
    items = triton.cdiv(K, config.block_k) * triton.cdiv(D, config.block_d)
    return arguments, constants, items + triton.cdiv(K, CARRY_ROWS) * (1 + len(words))


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
        empty(
            (tensor.shape[0], B, capacity) if is_stacked else (B, capacity, *tensor.shape[2:]),
            dtype=tensor.dtype,
            device=tensor.device,
        )
        for tensor, is_stacked in zip(carry, stacked, strict=True)
    ]
    rows = empty((B, capacity, D), dtype=embeds.dtype, device=embeds.device)
    return rows, empty((B, capacity), dtype=torch.int64, device=embeds.device), outs


score_select = define_op(
    "score_select(Tensor embeds, Tensor vision_mask, Tensor text_mask, Tensor? protect, Tensor? weight, "
    "SymInt[] ratios, float[] numbers, SymInt capacity, Tensor? given=None, " + TOLD + ") -> "
    "(Tensor scores, Tensor gap, Tensor counts, Tensor lengths, Tensor order, Tensor[] own)",
    reference=specification.score_select,
    triton=_score_select_triton,
    fake=_score_select_fake,
)
gather_sequence = define_op(
    "gather_sequence(Tensor embeds, Tensor order, Tensor lengths, Tensor[] carry, Scalar[] pads, bool[] stacked, "
    "SymInt capacity, bool left) -> (Tensor out, Tensor index, Tensor[] carried)",
    reference=specification.gather_sequence,
    triton=_gather_sequence_triton,
    fake=_gather_sequence_fake,
)
