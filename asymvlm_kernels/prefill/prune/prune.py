"""Drop the least important vision tokens of a prompt: score, gap, budget, selection and gather as one call.

`prune_sequence` checks its arguments and picks one of three registered ops. A result of known length is `prune_static`
(see `known_length`); else `score_select` says which places are kept and `gather_sequence` moves them (`two_launches`).
Scores that spread, a relative threshold and a floor of relevant tokens go along (`score_rule`). Several images with
floors of their own, budgets that are not this package's and rows beyond ``LONGEST`` take the ops that `score_select` is
made of, one after the other (`specification.select_places`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from asymvlm_kernels._checks import (
    WORDS,
    check_no_grad,
)
from asymvlm_kernels.budget import (
    AtLeastRelevant,
    Budget,
    LinearBudget,
    RelativeThresholdBudget,
    ScoreBudget,
    ThresholdBudget,
    UniformBudget,
    as_budget,
)
from asymvlm_kernels.launch import Remembered, outline
from asymvlm_kernels.prefill.gather import _gather_rows, gather_rows
from asymvlm_kernels.prefill.prune.arguments import check_arguments, check_rules, is_stacked
from asymvlm_kernels.prefill.prune.known_length import prune_static
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.prune.specification import Steps, longest, select_places
from asymvlm_kernels.prefill.prune.two_launches import (
    LONGEST,
    MOST_CARRIES,
    encode_budget,
    gather_sequence,
    score_select,
)
from asymvlm_kernels.prefill.score import _score_tokens
from asymvlm_kernels.prefill.select import _importance_gap, _select_tokens
from asymvlm_kernels.prefill.spread import Spread

MOST_ROWS = 65535  # of a batch: the second axis of a grid
# of budgets, spreads and floors: equal ones give the same answer
RULES = frozenset({float, int, type(None), UniformBudget, ThresholdBudget, LinearBudget, RelativeThresholdBudget})
RULES |= {Spread, AtLeastRelevant}
MOST_NUMBERS = 64  # of a token in a tensor that the gather of the embeddings moves along

REGISTERED = Steps(_gather_rows, _score_tokens, _importance_gap, _select_tokens, longest)


@dataclass(frozen=True)
class PrunedSequence:
    """The shortened sequence of `prune_sequence`. S' is its length, K the kept vision tokens of a row."""

    embeds: torch.Tensor  # (B, S', D), zero rows where padded
    index: torch.Tensor  # (B, S') int64, place in the original sequence, -1 = padding
    lengths: torch.Tensor  # (B,) int32, real tokens of each row
    counts: torch.Tensor  # (B,) int32, K: kept prunable vision tokens
    scores: torch.Tensor  # (B, S) fp32, -inf outside the prunable vision tokens
    gap: torch.Tensor  # (B,) fp32
    own: torch.Tensor  # (B, S) fp32, the scores before they spread; the same tensor where nothing does
    carry: dict[str, torch.Tensor] = field(default_factory=dict)  # gathered along; (B, S', ...) or (R, B, S')


def prune_sequence(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    weight: torch.Tensor | None = None,
    budget: float | Budget | ScoreBudget | None = None,
    *,
    scores: torch.Tensor | None = None,
    protect: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    per_image: bool = False,
    spread: Spread | None = None,
    lines: torch.Tensor | None = None,
    floor: AtLeastRelevant | None = None,
    carry: Mapping[str, torch.Tensor] | None = None,
    carry_pad: Mapping[str, float] | None = None,
    static: bool = False,
    capacity: int | None = None,
    padding_side: str = "left",
) -> PrunedSequence:
    """Drop the least important vision tokens of each sample and close the gaps.

    Kept are: the tokens of ``text_mask``, those of ``protect``, and the K best of the others in ``vision_mask``. A
    token in none of the three masks is padding and is dropped. A sample without text keeps all its vision tokens,
    unless ``scores`` are given: then the budget holds for every sample.

    Args:
        embeds: ``(B, S, D)`` fp32, fp16 or bf16: merged embeddings before decoder layer 0.
        vision_mask: ``(B, S)`` bool: vision tokens. A token in both masks is a vision token.
        text_mask: ``(B, S)`` bool: tokens that vision is scored against.
        weight: ``(D,)`` fp32 learned weight; None means ones.
        budget: how many to keep; a number is the ratio of a `UniformBudget`, None means 0.5. A `ScoreBudget` goes step
            by step.
        scores: ``(B, S)`` fp32: importance of each vision token given by the caller, in place of the similarity to the
            text; used where vision is prunable, ignored elsewhere. NaN ranks last. Excludes ``weight``.
        protect: ``(B, S)`` bool: kept whatever the score, outside N, K and the gap (separators, template tokens).
        groups: ``(B, S)`` integer: number of the image each vision token belongs to. In a row with two images or more,
            each keeps at least ``max(8, N_image // 16)`` tokens, or all it has; K grows where these floors exceed it.
        per_image: rank each image of ``groups`` by itself, with the row's ratio, instead of all together.
        spread: hand scores on along the lines of an image before anything is read off them.
        lines: ``(B, S)`` int64 or int32, for ``spread``: the line that each vision token lies on, negative for none.
        floor: keep at least the tokens that look relevant, counted before scores spread.
        carry: per-token tensors gathered along, ``(B, S, ...)`` or ``(R, B, S)`` (M-RoPE positions).
        carry_pad: value for padding in the tensor of that name, of its dtype; 0 where none is given.
        static: True gives S' = ``capacity`` and no synchronisation. False trims S' to the longest row, which takes one
            small device-to-host copy of the lengths (two with ``groups`` or a budget of your own).
        capacity: S' of a static result; None means S. A longer row loses, worst first, vision tokens, then
            those that an image is sure to keep, then protected tokens, then text, of the last two the rearmost.
        padding_side: ``"left"`` or ``"right"``.
    Returns:
        `PrunedSequence`.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, an unknown side, ``scores`` with a ``weight``,
            ``per_image`` without ``groups``, ``spread`` without ``lines``, a name or value in ``carry_pad`` that does
            not fit, a ``capacity`` that is negative or not static, or an input that requires grad in grad mode.

    Given equal scores the kept index is the same on every backend, ties included (see `select_tokens`); scores that
    lie closer together than two backends round may change places (see `score_tokens`). Source: sections 3.2 and 3.3
    of arXiv:2605.29535.
    """
    carry, pads = carry or {}, carry_pad or {}
    inputs = (embeds, vision_mask, text_mask, protect, weight, scores, groups, per_image, lines)
    plan = _planned(inputs, (budget, spread, floor), carry, pads, static, capacity, padding_side)
    check_no_grad("prune_sequence", embeds=embeds, weight=weight, scores=scores, **carry)
    most, left, narrow = plan.capacity, plan.left, plan.narrow
    tokens, moving = inputs[:5], ([carry[name] for name in narrow], plan.pads, plan.stacked)
    told = ScoreRule.of(spread, lines, floor).told()
    if static and plan.encoded is not None:
        ranked, gap, counts, lengths, rows, index, moved, own = prune_static(
            *tokens, *plan.encoded, *moving, most, left, scores, *told
        )
    else:
        if plan.encoded is not None:
            ranked, gap, counts, lengths, order, own = score_select(*tokens, *plan.encoded, most, scores, *told)
        else:
            ranked, gap, counts, lengths, order, own = select_places(
                *(REGISTERED, tokens, scores, plan.budget, most),
                groups=groups,
                per_image=per_image,
                spreading=None if spread is None or lines is None else (spread, lines),
                floor=floor,
                static=static,
            )
        most = most if static else longest(lengths)
        rows, index, moved = gather_sequence(embeds, order, lengths, *moving, most, left)
    done = dict(zip(narrow, moved)) if narrow else {}
    if len(done) < len(carry):
        done = {
            name: done[name]
            if name in done
            else _gather_carry(tensor, index, pads.get(name, 0), is_stacked(tensor, embeds))
            for name, tensor in carry.items()
        }
    return PrunedSequence(rows, index, lengths, counts, ranked, gap, own[0] if own else ranked, done)


class _Plan(NamedTuple):
    """What the arguments of `prune_sequence` come to, once they are checked."""

    budget: Budget | ScoreBudget
    encoded: tuple[list[int], list[float]] | None  # the budget as `score_select` takes it
    narrow: list[str]  # tensors that the gather of the embeddings moves along, with their pads
    pads: list[float]
    stacked: list[bool]
    capacity: int
    left: bool


_plans = Remembered()


def _planned(
    inputs: tuple[Any, ...],
    rules: tuple[Any, ...],
    carry: Mapping[str, torch.Tensor],
    pads: Mapping[str, float],
    *options: Any,
) -> _Plan:
    """`_plan`, remembered by what it looks at: sizes, strides and types, the numbers and the names."""
    known = RULES.issuperset(map(type, rules)) and not torch.compiler.is_compiling()
    key = outline((*inputs, *carry.values(), *carry, *pads.values(), *pads, *options)) if known else None
    if key is None:
        return _plan(inputs, rules, carry, pads, *options)
    key = (key, len(carry), rules)
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(inputs, rules, carry, pads, *options)
        _plans.put(key, plan)
    return plan


def _plan(
    inputs: tuple[Any, ...],
    rules: tuple[Any, ...],
    carry: Mapping[str, torch.Tensor],
    pads: Mapping[str, float],
    static: bool,
    capacity: int | None,
    padding_side: str,
) -> _Plan:
    embeds, vision_mask, text_mask, protect, weight, scores, groups, per_image, lines = inputs
    budget, spread, floor = rules
    budget = as_budget(0.5 if budget is None else budget)
    masks = {"vision_mask": vision_mask, "text_mask": text_mask, "protect": protect}
    check_arguments(embeds, weight, scores, masks, groups, per_image, carry, pads, padding_side)
    if capacity is not None and (capacity < 0 or not static):
        raise ValueError(f"capacity must be 0 or more and goes with static=True, got {capacity} and static={static}")
    check_rules(embeds, spread, lines, floor)
    narrow = [name for name, tensor in carry.items() if _is_narrow(tensor, embeds)][:MOST_CARRIES]
    return _Plan(
        budget=budget,
        encoded=None
        if groups is not None or not RULES.issuperset(map(type, (spread, floor)))
        else _encoded(budget, embeds),
        narrow=narrow,
        pads=alike([pads.get(name, 0) for name in narrow]),
        stacked=[is_stacked(carry[name], embeds) for name in narrow],
        capacity=embeds.shape[1] if capacity is None else capacity,
        left=padding_side == "left",
    )


def alike(pads: list[float]) -> list[float]:
    """Numbers of one type, and at least one: torch.export writes no other list of numbers to a file."""
    if all(isinstance(pad, int) for pad in pads):
        return [int(pad) for pad in pads] or [0]
    return [float(pad) for pad in pads] if all(float(pad) == pad or pad != pad for pad in pads) else pads


def _encoded(budget: Budget | ScoreBudget, embeds: torch.Tensor) -> tuple[list[int], list[float]] | None:
    """The budget as `score_select` takes it; None where it is not one of ours, or the batch is beyond a launch."""
    B, S, _ = embeds.shape
    return encode_budget(budget) if S <= LONGEST and B <= MOST_ROWS else None


def _is_narrow(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """True for a few numbers a token, which the gather of the embeddings moves along."""
    width = tensor.numel() // max(like.shape[0] * like.shape[1], 1)
    return tensor.itemsize in WORDS and 0 < width <= MOST_NUMBERS


def _gather_carry(tensor: torch.Tensor, index: torch.Tensor, pad: float, stacked: bool) -> torch.Tensor:
    if not stacked:
        return gather_rows(tensor, index, pad=pad)
    return gather_rows(tensor.permute(1, 2, 0), index, pad=pad).permute(2, 0, 1).contiguous()
