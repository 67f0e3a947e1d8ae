"""From a prompt that was read to the tokens that stay: the method scores, the kernels select and gather."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from asymvlm.hf.arguments import IDS
from asymvlm.methods.before.base import BeforeMethod, PositiveScores, SelectingMethod, VisionPrompt
from asymvlm.methods.before.similarity import AsymVLM
from asymvlm.models.adapter import Adapter
from asymvlm.prompt.background import Background
from asymvlm.prompt.padding import pad_in_place, padding_to_keep
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import has_several
from asymvlm.tokens.roles import Tokens
from asymvlm_kernels import PrunedSequence, UniformBudget, gather_rows, importance_gap, keep_counts, prune_sequence
from asymvlm_kernels.budget import budget_counts


def choose_and_gather(
    adapter: Adapter,
    policy: VisionPruning,
    prompt: VisionPrompt,
    side: str,
    *,
    carry: dict[str, torch.Tensor],
    ids_pad: int,
    behind_a_turn: bool,
    background: int = 0,
) -> PrunedSequence:
    """Score, select and gather; padding that has to stay where it is counts as kept.

    Args:
        side: where rows are filled up. carry: per-token tensors to gather along.
        behind_a_turn: the prompt goes behind others in a cache.
        background: how many of the lowest scored tokens stay besides.
    """
    tokens, method = prompt.tokens, policy.scored_by
    assert isinstance(method, BeforeMethod)
    per_token = {name: rows for name, rows in carry.items() if name in adapter.per_token}
    carry_pad = {IDS: ids_pad, **{name: adapter.per_token[name] for name in per_token}}
    protect = tokens.text | tokens.structural
    if side == "left":
        protect = protect | padding_to_keep(tokens.real, tokens.prunable)
    choice, embeds, alone = _choice(policy, method, prompt, fused=not background)
    silent = None
    if method.needs_text and "scores" in choice:  # nothing to score against: all of it stays
        silent = tokens.prunable & ~prompt.text.any(-1, keepdim=True)
        protect = protect | silent
    lines = None if policy.spread is None else prompt.cells.line
    beside = None
    if background:
        candidates = tokens.prunable if silent is None else tokens.prunable & ~silent
        beside = Background.of(choice["scores"], policy.spread, lines, candidates, background)
        protect = protect | beside.mask
    exact = embeds.dtype == torch.float64  # scores are fp32, embeddings stay as they are
    # one image a row needs no floors, and the fused path serves it
    several = policy.per_image or (not alone and has_several(prompt.grids, adapter.views))
    pruned = prune_sequence(
        embeds.float() if exact else embeds,
        tokens.vision,
        prompt.text,
        **choice,
        protect=protect,
        groups=prompt.images if several else None,
        per_image=policy.per_image,
        spread=policy.spread,
        lines=lines,
        floor=policy.relevance if policy.at_least_relevant else None,
        carry=carry,
        carry_pad=carry_pad,
        padding_side=side,
    )
    if silent is not None:
        pruned = dataclasses.replace(pruned, counts=pruned.counts + silent.sum(-1).to(pruned.counts))
    if beside is not None:
        pruned = beside.told(pruned)
    if behind_a_turn and len(embeds) > 1:
        pruned = pad_in_place(pruned, carry_pad, {name: x for name, x in per_token.items() if name != "labels"})
    return dataclasses.replace(pruned, embeds=gather_rows(embeds, pruned.index)) if exact else pruned


def _choice(
    policy: VisionPruning, method: BeforeMethod, prompt: VisionPrompt, *, fused: bool
) -> tuple[dict[str, Any], torch.Tensor, bool]:
    """How `prune_sequence` is to choose, the embeddings to gather, and whether the method chooses alone.

    ``fused``: cosine scores may be left to `prune_sequence`.
    """
    tokens, embeds = prompt.tokens, prompt.embeds
    if fused and isinstance(method, AsymVLM):
        weight = None if method.weight is None else method.weight.detach().to(embeds.device)
        return {"budget": policy.budget, "weight": weight}, embeds, False
    if isinstance(method, SelectingMethod):
        kept = method.keep(prompt, _counts(policy, method, prompt))
        check_answer(method, "mask", kept.mask, tokens, torch.bool)
        embeds = embeds if kept.embeds is None else kept.embeds.to(embeds.dtype)
        return {"scores": kept.mask.float(), "budget": PositiveScores()}, embeds, kept.alone
    scores = method.scores(prompt)
    check_answer(method, "scores", scores, tokens, torch.float32)
    return {"budget": policy.budget, "scores": scores}, embeds, False


def _counts(policy: VisionPruning, method: SelectingMethod, prompt: VisionPrompt) -> torch.Tensor:
    """How many tokens a method is to choose, ``(B,)`` int32."""
    prunable = prompt.tokens.prunable
    if isinstance(policy.budget, UniformBudget):
        gap = torch.zeros(len(prunable), device=prunable.device)
        return keep_counts(gap, prunable.sum(-1), policy.budget)
    scores = method.scores(prompt)
    return budget_counts(policy.budget, scores, importance_gap(scores, prunable), prunable)


def check_answer(method: object, what: str, found: Any, tokens: Tokens, dtype: torch.dtype) -> None:
    """Raise a ValueError, in the words of whoever wrote the method, for what is no tensor ``(B, S)`` of ``dtype``."""
    wanted = tuple(tokens.ids.shape)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != wanted or found.dtype != dtype:
        told = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"the {what} of {type(method).__name__} must be {wanted} {dtype}, got {told}")
