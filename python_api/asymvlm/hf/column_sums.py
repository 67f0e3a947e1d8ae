"""Attention of many tokens of one step, summed over them: what a prompt's tokens are scored by in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.hf.masks import opened
from asymvlm_kernels import attention_column_sums

WIDEST_HEAD = 256  # that the kernels take
BLOCK = 64  # queries whose logits are in memory at once, where weights are counted


@dataclass(frozen=True, eq=False)
class Queries:
    """The tokens of a step that score a layer's slots.

    One line for each row of the batch, or for each K/V head of each row, as in `Places`.
    """

    slot_pos: torch.Tensor  # (lines, S) int32, negative = not visible
    q_pos: torch.Tensor  # (B, n) int64: last column that each token sees, -1 for none
    numbers: torch.Tensor | None = None  # (B, n) int64: which tokens of the step they are; None: all
    heads: int = 1  # lines of a row
    counts: list[torch.Tensor] | None = field(default=None, repr=False)  # gets what `large_weights` finds
    threshold: float = 0.0


def seen_by(mask: Any, real: torch.Tensor, first: int) -> torch.Tensor:
    """``(B, Q)`` int64: the last column that each of a step's tokens sees; -1 for padding.

    Args:
        mask: what the decoder attends by: ``(B, 1, Q, columns)`` bool or additive, where tokens may see some behind
            them. Any other: each token sees those up to itself.
        real: ``(B, Q)`` bool. first: column of the step's first token.
    Raises:
        NotImplementedError: for a mask with gaps, or of an unknown kind. Copies a flag to the host for a dense mask.
    """
    queries = real.shape[1]
    own = torch.arange(queries, device=real.device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        allowed = opened(mask)[:, 0, :, -queries:].to(real.device)
        allowed = (allowed & real[:, None]).expand(len(real), -1, -1)
        last = queries - 1 - allowed.flip(-1).to(torch.int8).argmax(-1)
        wanted = (own <= last[..., None]) & real[:, None]
        if bool(((allowed != wanted) & real[..., None]).any()):
            raise NotImplementedError("attention to a prompt is added up where tokens see all before a last one")
        return (last + first).masked_fill(~real, -1)
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise NotImplementedError(
            f"attention to a prompt is added up under 2-D and dense masks, got {type(mask).__name__}"
        )
    return (own + first).expand_as(real).masked_fill(~real, -1)


def large_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor,
    threshold: float,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """``(B, 2)`` int64: attention weights of at least ``threshold`` of their row's largest, and weights in all.

    ``query`` ``(B, H, n, D)``, ``key`` ``(B, G, S, D)``. Memory is a block of rows; a ratio of weights is a difference
    of logits, so no softmax is taken.
    """
    total = torch.zeros((len(query), 2), dtype=torch.int64, device=query.device)
    for logits in logit_blocks(query, key, q_pos, slot_pos, scale, softcap):
        seen = logits > -torch.inf
        large = seen & (logits >= logits.amax(-1, keepdim=True) + math.log(threshold))
        total += torch.stack([large.flatten(1).sum(1), seen.flatten(1).sum(1)], 1)
    return total


def logit_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor,
    scale: float,
    softcap: float,
    window: int | None = None,
) -> Iterator[torch.Tensor]:
    """``(B, G, H / G, block, S)`` fp32 of a few queries at a time; -inf where a key is not seen."""
    keys = key.float().mT[:, :, None]
    for start in range(0, query.shape[2], BLOCK):
        rows = query[:, :, start : start + BLOCK].float().unflatten(1, (key.shape[1], -1))
        logits = rows @ keys * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        back = q_pos[:, start : start + BLOCK, None] - slot_pos[:, None]
        seen = (slot_pos >= 0)[:, None] & (back >= 0)
        seen = seen if window is None else seen & (back < window)
        yield logits.masked_fill(~seen[:, None, None], -torch.inf)


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor,
    scale: float,
    softcap: float,
    window: int | None = None,
) -> torch.Tensor:
    """`asymvlm_kernels.attention_column_sums` of heads of any width and dtype, ``(B, G, S)`` fp32.

    Args:
        query: ``(B, H, Q, D)``. key: ``(B, G, S, D)``, as attention functions have them.
        q_pos: ``(B, Q)`` last column that each query sees, -1 for none. slot_pos: ``(B, S)`` int32.
        window: how many tokens, its own with them, a query sees; None for all.
    """
    if query.shape[-1] > WIDEST_HEAD:  # a query that sees nothing is NaN after softmax
        blocks = logit_blocks(query, key, q_pos, slot_pos, scale, softcap, window)
        total: torch.Tensor = sum(block.softmax(-1).nan_to_num(0.0).sum(-2).mean(2) for block in blocks)  # type: ignore[assignment]
        return total
    if query.dtype == torch.float64:  # scores are fp32 anyhow
        query, key = query.float(), key.float()
    return attention_column_sums(
        query.transpose(1, 2),
        key.transpose(1, 2),
        q_pos=q_pos,
        slot_pos=slot_pos,
        softmax_scale=scale,
        softcap=softcap,
        window=-1 if window is None else window - 1,
    )


def picked(query: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The queries ``numbers`` ``(B, n)`` (-1: any) of ``(B, H, Q, D)``: ``(B, H, n, D)``."""
    wide = numbers.to(query.device).clamp_min(0)[:, None, :, None]
    return query.gather(2, wide.expand(-1, query.shape[1], -1, query.shape[3]))


def sum_columns(query: torch.Tensor, key: torch.Tensor, queries: Queries, scale: float, softcap: float) -> torch.Tensor:
    """Attention of a step's tokens, summed over them and averaged over the heads of a line: ``(lines, S)`` fp32.

    ``query`` ``(B, H, Q, D)``, ``key`` ``(B, G, S, D)``.
    """
    query, key, q_pos = query.detach(), key.detach(), queries.q_pos.to(key.device)
    if queries.numbers is not None:
        query = picked(query, queries.numbers)
        q_pos = q_pos.masked_fill(queries.numbers.to(key.device) < 0, -1)
    if queries.heads > 1:
        query, key = heads_as_rows(query, key)
        q_pos = q_pos.repeat_interleave(queries.heads, 0)
    slot_pos = queries.slot_pos.to(key.device)
    if queries.counts is not None:
        found = large_weights(query, key, q_pos, slot_pos, queries.threshold, scale, softcap)
        queries.counts.append(found.unflatten(0, (-1, queries.heads)).sum(1))
    return column_sums(query, key, q_pos, slot_pos, scale, softcap).mean(1)


def heads_as_rows(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each K/V head as a row of its own: ``(B * G, H / G, Q, D)``, ``(B * G, 1, S, D)``."""
    return query.unflatten(1, (key.shape[1], -1)).flatten(0, 1), key.flatten(0, 1)[:, None]
