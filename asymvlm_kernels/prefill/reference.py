"""The prefill phase in plain PyTorch: specification, CPU path and test oracle at once.

The public functions beside this file check their arguments; these do not. Nothing here synchronises a CUDA device.
Axes: B batch, S sequence, N vision tokens, L text tokens, D width, K kept.
"""

from __future__ import annotations

import torch

EPSILON = 1e-12  # norms are clamped from below, so a zero row scores 0
ROWS = 512  # vision rows of one product, at most: their fp32 copy stays in cache; a normalised copy of V never exists
MINIMUM_ROWS = 16  # of fewer rows MKL sums in another order: a row alone would score other last bits
COLUMNS = 8  # text columns of one product are a multiple: on a Zen 4 core MKL takes 2.1 ms for 30 and 1.4 ms for 32
MINIMUM_COLUMNS = 16  # 8 take longer than 16, and a path with other last bits


def fold_text(text: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """``t'_j = w * t_j / ||t_j||``: ``(B, L, D)`` -> fp32 ``(B, L, D)``. The small side carries the weight."""
    text = text.float()
    text = text / torch.linalg.vector_norm(text, dim=-1, keepdim=True).clamp_min(EPSILON)
    return text if weight is None else text * weight


def score_tokens(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> torch.Tensor:
    """``s_i = max_j <v_i, t'_j> / ||v_i||``: equal to Eq. 1, which normalises and weights V instead."""
    B, N, _ = vision.shape
    L = text.shape[1]
    scores = vision.new_full((B, N), float("-inf"), dtype=torch.float32)
    if L == 0 or N == 0:
        return scores
    if vision_mask is not None and vision.device.type == "cpu":  # leave out what is masked at both ends, prompts mostly
        real = vision_mask.any(0).nonzero()
        first, last = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        if last - first < N:
            part, part_mask = vision[:, first:last], vision_mask[:, first:last]
            scores[:, first:last] = score_tokens(part, text, weight, part_mask, text_mask)
            return scores
    missing = max(-L % COLUMNS, MINIMUM_COLUMNS - L)
    folded = torch.nn.functional.pad(fold_text(text, weight), (0, 0, 0, missing)).mT  # (B, D, L rounded up)
    chunks = -(-N // ROWS)
    for rows, out in zip(vision.tensor_split(chunks, dim=1), scores.tensor_split(chunks, dim=1), strict=True):
        rows = rows.float()
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(MINIMUM_ROWS - rows.shape[1], 0)))
        similarity = (padded @ folded)[:, : rows.shape[1], :L]  # (B, rows, L)
        if text_mask is not None:
            similarity = similarity.masked_fill_(~text_mask[:, None], float("-inf"))
        norm = torch.linalg.vector_norm(rows, dim=-1).clamp_min(EPSILON)
        out.copy_(similarity.amax(-1) / norm)  # amax propagates NaN
    return scores if vision_mask is None else scores.masked_fill_(~vision_mask, float("-inf"))


def order_key(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """fp32 scores -> int64 keys that rank as the method does: -0 equals +0, NaN below -inf, masked below NaN."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 is +0.0
    key = torch.where(bits < 0, -bits - 2**31, bits)  # negative floats grow downwards
    key = key.masked_fill(scores.isnan(), -(2**31) - 1)
    return key if mask is None else key.masked_fill(~mask, -(2**31) - 2)


def importance_gap(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``g = s^(k) - s^(N-k+1)``, ``k = max(1, N // 4)``: exact order statistics, no interpolation."""
    B, N = scores.shape
    if N == 0:
        return scores.new_full((B,), float("nan"))
    order = order_key(scores, mask).argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order)
    count = torch.full((B, 1), N, device=scores.device) if mask is None else mask.sum(-1, keepdim=True)
    k = (count // 4).clamp_min(1)
    high = ranked.gather(-1, k - 1)
    low = ranked.gather(-1, (count - k).clamp_min(0))
    return (high - low).masked_fill(count == 0, float("nan")).squeeze(-1)


def select_tokens(scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor | None, capacity: int) -> torch.Tensor:
    """The ``counts`` best of each row, ascending, padded with -1 to ``capacity``. Stable sort: lowest index wins."""
    order = order_key(scores, mask).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    keep = rank < counts.clamp_max(capacity)[:, None]
    return compact(keep if mask is None else keep & mask, capacity)


def token_roles(
    vision_mask: torch.Tensor, text_mask: torch.Tensor, protect: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three ``(B, S)`` bool masks: tokens that may be dropped, that must stay, and that vision is scored against."""
    prunable = vision_mask if protect is None else vision_mask & ~protect
    must_stay = (text_mask if protect is None else text_mask | protect) & ~prunable
    return prunable, must_stay, text_mask & ~vision_mask


def compact(keep: torch.Tensor, capacity: int) -> torch.Tensor:
    """``(B, S)`` bool -> ``(B, capacity)`` int64: positions of True, ascending, padded with -1, cut at ``capacity``."""
    B, S = keep.shape
    slot = (keep.cumsum(-1) - 1).masked_fill(~keep, capacity).clamp_max(capacity)
    index = torch.full((B, capacity + 1), -1, dtype=torch.int64, device=keep.device)
    index.scatter_(-1, slot, torch.arange(S, device=keep.device).expand(B, S))
    return index[:, :capacity].contiguous()


def gather_rows(rows: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    """``out[b, k] = rows[b, index[b, k]]``; an index of -1 gives a row of ``pad``."""
    B, S = rows.shape[:2]
    if S == 0:
        return rows.new_full((*index.shape, *rows.shape[2:]), pad)
    place = index.clamp_min(0) + S * torch.arange(B, device=rows.device)[:, None]  # in the rows of all samples
    out = rows.reshape(B * S, *rows.shape[2:]).index_select(0, place.flatten()).view(*index.shape, *rows.shape[2:])
    missing = index < 0
    if rows.device.type == "cpu":  # a mask over all elements takes 4 times the copy; `nonzero` would synchronise a GPU
        out.flatten(0, 1).index_fill_(0, missing.flatten().nonzero()[:, 0], pad)
        return out
    return out.masked_fill_(missing.view(*index.shape, *(1,) * (rows.ndim - 2)), pad)
