"""Launchers of the prefill kernels in the CUDA library (csrc/prune.cu, csrc/select.cu): allocate, plan, launch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from asymvlm_kernels._checks import WORDS
from asymvlm_kernels.dispatch import Unsupported
from asymvlm_kernels.prefill.gather import _bits
from asymvlm_kernels.prefill.prune.known_length import (
    PruneStatic,
    _prune_static_fake,
    _prune_static_reference,
)
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.prune.scratch import zeroed_counters
from asymvlm_kernels.prefill.prune.two_launches import ScoreSelect, _score_select_fake, _score_select_reference
from asymvlm_kernels.unproven.cuda import library as cuda

_plans: dict[tuple[object, ...], cuda.Plan] = {}
MOST_PLANS = 256


def _select_tokens_cuda(
    scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor | None, capacity: int
) -> torch.Tensor:
    index = torch.empty((scores.shape[0], capacity), dtype=torch.int64, device=scores.device)
    _select(scores, counts.contiguous(), mask, index, None, capacity)
    return index


def _importance_gap_cuda(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    gap = torch.empty(scores.shape[0], dtype=torch.float32, device=scores.device)
    _select(scores, None, mask, None, gap, 0)
    return gap


def _select(
    scores: torch.Tensor,
    counts: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    gap: torch.Tensor | None,
    capacity: int,
) -> None:
    B, N = scores.shape
    if N > cuda.LONGEST:
        raise Unsupported(f"a row of {N} scores, at most {cuda.LONGEST} wanted")
    scores = scores.contiguous()
    mask = None if mask is None else mask.contiguous()
    library = cuda.library()
    code = library.asymvlm_select(
        scores.data_ptr(),
        cuda.pointer(mask),
        cuda.pointer(counts),
        counts is not None and counts.dtype == torch.int64,
        cuda.pointer(index),
        cuda.pointer(gap),
        B,
        N,
        capacity,
        cuda.stream(scores.device),
    )
    cuda.check(library, "asymvlm_select", code)


def _score_select_cuda(
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
    refuse(given, ratios, told)
    outputs = _score_select_fake(embeds, vision_mask, text_mask, protect, weight, ratios, numbers, capacity)
    *results, order, _ = outputs
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    if embeds.numel() == 0:
        return _score_select_reference(*tokens, ratios, numbers, capacity)
    prune(tokens, (*results, order, None, None), ratios, numbers, capacity)
    return outputs


def refuse(given: torch.Tensor | None, ratios: Sequence[int], told: tuple[Any, ...]) -> None:
    """The library has no kernel for scores of the caller's own, nor for what looks at all scores of a sample."""
    if given is not None:
        raise Unsupported("it scores vision tokens itself, and scores were given")
    if ScoreRule(*told).ranks_by_scores(ratios):
        raise Unsupported("it knows no spread, no relative threshold and no floor of relevant tokens")


def prune(
    tokens: tuple[torch.Tensor | None, ...],
    results: tuple[torch.Tensor | None, ...],
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    left: bool = False,
    carries: Sequence[cuda.Carry] = (),
    plan: cuda.Plan | None = None,
) -> None:
    """One launch: select, and gather where there is an ``out``.

    Args:
        tokens: embeds, vision mask, text mask, protect, weight.
        results: scores, gap, counts, lengths, order, out, index; the last three may be None.
        carries: from `carry_of`; the tensors behind them live until the launch.
        plan: to run another division of the work than the library's own: for tests.
    """
    embeds, vision, text, protect, weight = tokens
    assert embeds is not None
    assert vision is not None
    assert text is not None
    scores, gap, counts, lengths, order, out, index = results
    B, S, D = embeds.shape
    if S > cuda.LONGEST or D > cuda.WIDEST:
        raise Unsupported(f"{S} tokens of width {D}, at most {cuda.LONGEST} of {cuda.WIDEST} wanted")
    library = cuda.library()
    wide = [ctypes.c_float(number).value for number in numbers] if ratios else list(numbers)  # a gap is fp32
    call = cuda.Prune(
        *(embeds.data_ptr(), cuda.pointer(weight), vision.data_ptr(), text.data_ptr(), cuda.pointer(protect)),
        *map(cuda.pointer, (scores, gap, counts, lengths, order, out, index)),
        *(None, None),  # workspace and counters, when their sizes are known
        *embeds.stride(),
        0 if weight is None else weight.stride(0),
        *vision.stride(),
        *text.stride(),
        *((0, 0) if protect is None else protect.stride()),
        (cuda.Long * 3)(*(ratios or (0, 0, 0))),
        (ctypes.c_double * 5)(*wide),
        *(B, S, D, capacity, cuda.DTYPES[embeds.dtype], left, not ratios, len(carries)),
        (cuda.Carry * cuda.MOST_CARRIES)(*carries),
    )
    plan = _plan(library, call, embeds, weight, out) if plan is None else plan
    workspace = torch.empty(-(-plan.workspace // 4), dtype=torch.int32, device=embeds.device)
    counters = zeroed_counters(embeds.device, plan.counters)
    call.workspace, call.counters = workspace.data_ptr(), counters.data_ptr()
    code = library.asymvlm_prune(ctypes.byref(call), ctypes.byref(plan), cuda.stream(embeds.device))
    cuda.check(library, "asymvlm_prune", code)


def _plan(
    library: ctypes.CDLL,
    call: cuda.Prune,
    embeds: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
) -> cuda.Plan:
    """The library's division of the work, kept: it asks the driver how many blocks are resident at once."""
    rows = (embeds.device, embeds.dtype, embeds.shape, embeds.stride(), embeds.data_ptr() % 16)
    others = (
        None if weight is None else (weight.stride(), weight.data_ptr() % 16),
        out is not None and out.data_ptr() % 16,
    )
    key = (library._name, *rows, *others)
    plan = _plans.get(key)
    if plan is None:
        plan = cuda.Plan()
        cuda.check(library, "asymvlm_prune_plan", library.asymvlm_prune_plan(ctypes.byref(call), ctypes.byref(plan)))
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def carry_of(word: torch.Tensor, out: torch.Tensor, stacked: bool, pad: float, dtype: torch.dtype) -> cuda.Carry:
    """``word`` ``(B, S, X)`` and ``out`` as integers of the size of ``dtype``, in which ``pad`` is given."""
    bits = _bits(pad, math.copysign(1, pad), dtype)
    strides = (word.stride(0), word.stride(1), word.stride(2))
    return cuda.Carry(word.data_ptr(), out.data_ptr(), bits, *strides, word.shape[2], word.itemsize, stacked, 0)


def carry_words(tensor: torch.Tensor, stacked: bool) -> torch.Tensor:
    """``(B, S, ...)`` or ``(X, B, S)`` as ``(B, S, X)`` integers; copied where its trailing axes are not one axis."""
    word = tensor.view(WORDS[tensor.itemsize])
    if stacked:
        return word.permute(1, 2, 0)
    return word.reshape(*word.shape[:2], math.prod(word.shape[2:]))


def _prune_static_cuda(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
    given: torch.Tensor | None = None,
    *told: Any,
) -> PruneStatic:
    tokens = (embeds, vision_mask, text_mask, protect, weight)
    refuse(given, ratios, told)
    if embeds.numel() == 0:
        return _prune_static_reference(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    outputs = _prune_static_fake(*tokens, ratios, numbers, carry, pads, stacked, capacity, left)
    *results, out, index, outs, _ = outputs
    words = [carry_words(tensor, is_stacked) for tensor, is_stacked in zip(carry, stacked, strict=True)]
    carries = [
        carry_of(word, result, is_stacked, pad, result.dtype)
        for word, result, is_stacked, pad in zip(words, outs, stacked, pads)
    ]
    prune(tokens, (*results, None, out, index), ratios, numbers, capacity, left, carries)
    return outputs


LAUNCHERS = {
    "select_tokens": _select_tokens_cuda,
    "importance_gap": _importance_gap_cuda,
    "score_select": _score_select_cuda,
    "prune_static": _prune_static_cuda,
}
