"""The prefill phase in plain PyTorch: specification, CPU path and test oracle at once.

The public functions beside this file check their arguments; these do not. Nothing here synchronises a CUDA device.
Axes: B batch, S sequence, N vision tokens, L text tokens, D width, K kept.
"""

from __future__ import annotations

import math

import torch

from asymvlm_kernels._checks import WORDS
from asymvlm_kernels.ranking import order_key

SECOND_HIGHEST = 2.0**128 - 2.0**105  # finite fp32 number: the higher ranks are for tokens that must stay
SMALLEST_NORM, LARGEST_NORM = 2.0**-50, 2.0**60  # whose squares, and the sum of a row's, fp32 holds
EPSILON = 1e-12  # norms of lifted rows are clamped from below, so a zero row scores 0
ROWS = 512  # vision rows of one product, at most: their fp32 copy stays in cache; a normalised copy of V never exists
FEW_COLUMNS = 64  # up to here half as many of a 16-bit dtype: their fp32 copy is most of the work, and stays nearer
MINIMUM_ROWS = 16  # of fewer rows MKL sums in another order: a row alone would score other last bits
COLUMNS = 8  # text columns of one product are a multiple: on a Zen 4 core MKL takes 2.1 ms for 30 and 1.4 ms for 32
MINIMUM_COLUMNS = 16  # against 8 MKL sums some rows of one product in another order than others, and takes longer


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the precision of the arithmetic: fp32, or float64 if it came in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def lift_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``(..., D)`` times a power of two each, ``(..., 1)``: their largest is about 1, so that no square overflows
    or vanishes. Exact: sums, norms and quotients of the lifted rows have the digits of the others."""
    peak = rows.abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.new_zeros(*rows.shape[:-1], 1)
    exponent = torch.where((peak > 0) & peak.isfinite(), torch.frexp(peak).exponent, 0).clamp(-126, 126)
    factor = torch.ldexp(torch.ones_like(peak), -exponent)
    return rows * factor, factor


def fold_text(text: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """``t'_j = w * t_j / ||t_j||``: ``(B, L, D)`` -> fp32 ``(B, L, D)``. The small side carries the weight."""
    text, _ = lift_rows(wide(text))
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
    scores = vision.new_full(vision.shape[:2], float("-inf"), dtype=wide(vision[:0]).dtype)
    _score_into((scores,), vision, text, weight, vision_mask, text_mask)
    return scores


def score_tokens_best(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`score_tokens` and what its gradient needs: the best text of each row, the lowest index of equal ones (int32, -1
    where the score is no function of the weight), and ``||v_i||``, NaN where the score is."""
    scores = vision.new_full(vision.shape[:2], float("-inf"), dtype=wide(vision[:0]).dtype)
    best, norm = torch.full_like(scores, -1, dtype=torch.int32), torch.ones_like(scores)
    _score_into((scores, best, norm), vision, text, weight, vision_mask, text_mask)
    return scores, best, norm


def _score_into(
    outs: tuple[torch.Tensor, ...],
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> None:
    """Fill ``(B, N)`` scores, or scores, best text and norm: tensors that hold the answer for no text already."""
    N, L = vision.shape[1], text.shape[1]
    if L == 0 or N == 0:
        return
    for b, (rows, columns) in enumerate(zip(vision, text, strict=True)):
        parts, places, hidden = tuple(out[b] for out in outs), None, None
        real = None if vision_mask is None else vision_mask[b]
        if real is not None and vision.device.type == "cpu":  # leave out what is masked at both ends, prompts mostly
            used = real.nonzero()
            first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
            rows, real, parts = rows[first:last], real[first:last], tuple(part[first:last] for part in parts)
        if text_mask is not None and vision.device.type == "cpu":
            places = text_mask[b].nonzero()[:, 0]
            columns = columns[places]
        elif text_mask is not None:
            hidden = ~text_mask[b]
        if len(rows) == 0 or len(columns) == 0:
            continue
        _score_sample(parts, rows, fold_text(columns, weight), hidden)
        if places is not None:
            for best in parts[1:2]:
                best.copy_(torch.where(best < 0, best, places[best.clamp_min(0)]))
        if real is not None:
            parts[0].masked_fill_(~real, float("-inf"))
            for best in parts[1:2]:
                best.masked_fill_(~real, -1)


def _score_sample(
    outs: tuple[torch.Tensor, ...], vision: torch.Tensor, folded: torch.Tensor, hidden: torch.Tensor | None
) -> None:
    """The ``(N,)`` outs of one sample against all columns but the ``hidden`` ones.

    The sample alone decides the shape of every product, so on a CPU its scores do not depend on its batch, whatever the
    library does. A row's do not depend on the rows beside it if the library sums the rows of a product in one order,
    however many (from MINIMUM_ROWS on) they are. MKL does, with and without AVX-512: a test holds it to that.
    """
    L = len(folded)
    size = ROWS if L > FEW_COLUMNS or vision.dtype == torch.float32 else ROWS // 2
    folded = _fill(folded, max(-L % COLUMNS, MINIMUM_COLUMNS - L)).mT  # (D, L rounded up)
    for rows, value, *more in zip(*(tensor.split(size) for tensor in (vision, *outs)), strict=True):
        count = len(rows)
        rows, factor = _fill(wide(rows), MINIMUM_ROWS - count), None
        norm = torch.linalg.vector_norm(rows, dim=-1)
        if rows.device.type != "cpu" or _squares_fail(rows, norm):  # a GPU would have to wait for the answer
            rows, factor = lift_rows(rows)
            norm = torch.linalg.vector_norm(rows, dim=-1)
        similarity, norm = (rows @ folded)[:count, :L], norm[:count].clamp_min(EPSILON)
        if hidden is not None:
            similarity = similarity.masked_fill_(hidden, float("-inf"))
        if not more:
            top = similarity.amax(-1)  # amax and max propagate NaN
        else:
            top, index = similarity.max(-1)  # the first of equal ones
            more[0].copy_(index.masked_fill_(top == float("-inf"), -1))
            own = norm if factor is None else norm / factor[:count, 0]
            more[1].copy_(own.masked_fill((top / norm).isnan(), float("nan")))
        value.copy_(top / norm)


def _squares_fail(rows: torch.Tensor, norm: torch.Tensor) -> bool:
    """Whether the squares of a row that is not zero overflowed or lost digits, so that ``norm`` is not its norm."""
    failed = (norm <= SMALLEST_NORM) | (norm >= LARGEST_NORM)
    return bool(failed.any()) and bool(rows[failed].any())


def _fill(rows: torch.Tensor, missing: int) -> torch.Tensor:
    """``(S, D)`` with as many rows of zeros more. (Padding by nothing would copy.)"""
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def score_tokens_grad(
    grad: torch.Tensor, vision: torch.Tensor, text: torch.Tensor, best: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """``dw = sum_i grad_i * v_i / ||v_i|| * t_best(i) / ||t_best(i)||``: ``(D,)``, in the dtype of ``grad``.

    Rows whose ``best`` is -1 or whose ``grad`` is 0 are left out, whatever they hold.
    """
    (B, N, D), L = vision.shape, text.shape[1]
    if L == 0 or N == 0:
        return grad.new_zeros(D)
    unit = fold_text(text, None)
    sums = grad.new_zeros(B, L, D)  # of the rows that each text is best for
    used = torch.zeros((B, L, 1), dtype=torch.bool, device=grad.device)
    share = torch.where((best >= 0) & (grad != 0), grad / norm, 0.0)
    chunks = -(-N // ROWS)
    for rows, part, index in zip(*(x.tensor_split(chunks, dim=1) for x in (vision, share, best)), strict=True):
        rows = wide(rows).masked_fill((part == 0)[..., None], 0.0)  # 0 * NaN would be NaN
        shares = part.new_zeros(*part.shape, L).scatter_(-1, index.clamp_min(0).long()[..., None], part[..., None])
        sums.baddbmm_(shares.mT, rows)
        used |= (shares != 0).any(1)[..., None]
    return (sums * unit.masked_fill(~used, 0.0)).sum((0, 1))


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


def given_scores(scores: torch.Tensor, prunable: torch.Tensor) -> torch.Tensor:
    """Scores of the caller's own as the method ranks them: -inf outside the prunable tokens, and +inf, which would rank
    with tokens that must stay, as the largest number below theirs."""
    return scores.clamp_max(SECOND_HIGHEST).masked_fill(~prunable, float("-inf"))


def rank_scores(scores: torch.Tensor, must_stay: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Scores of a whole sequence, so that one selection serves it: text, then protected tokens, then the others."""
    highest = torch.finfo(torch.float32).max
    return scores.clamp_max(SECOND_HIGHEST).masked_fill(must_stay, highest).masked_fill(text, float("inf"))


def compact(keep: torch.Tensor, capacity: int) -> torch.Tensor:
    """``(B, S)`` bool -> ``(B, capacity)`` int64: positions of True, ascending, padded with -1, cut at ``capacity``."""
    B, S = keep.shape
    slot = (keep.cumsum(-1) - 1).masked_fill(~keep, capacity).clamp_max(capacity)
    index = torch.full((B, capacity + 1), -1, dtype=torch.int64, device=keep.device)
    index.scatter_(-1, slot, torch.arange(S, device=keep.device).expand(B, S))
    return index[:, :capacity].contiguous()


def gather_rows(rows: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    """``out[b, k] = rows[b, index[b, k]]``; an index of -1 gives a row of ``pad``."""
    value = torch.zeros((), dtype=rows.dtype, device=rows.device)
    if (pad, math.copysign(1, pad)) != (0, 1):
        value = torch.full((), pad, dtype=rows.dtype, device=rows.device)
    word = WORDS.get(rows.itemsize)
    if word is None:
        return _gather_words(rows, index, value)
    return _gather_words(rows.view(word), index, value.view(word)).view(rows.dtype)  # PyTorch indexes few other types


def _gather_words(rows: torch.Tensor, index: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    B, S = rows.shape[:2]
    if S == 0:
        return pad.expand((*index.shape, *rows.shape[2:])).clone(memory_format=torch.contiguous_format)
    place = index.clamp_min(0) + S * torch.arange(B, device=rows.device)[:, None]  # in the rows of all samples
    out = rows.reshape(B * S, *rows.shape[2:]).index_select(0, place.flatten()).view(*index.shape, *rows.shape[2:])
    missing = index < 0
    if rows.device.type == "cpu":  # a mask over all elements takes 4 times the copy; `nonzero` would synchronise a GPU
        out.flatten(0, 1).index_fill_(0, missing.flatten().nonzero()[:, 0], pad)
        return out
    return out.masked_fill_(missing.view(*index.shape, *(1,) * (rows.ndim - 2)), pad)


def relative_counts(
    scores: torch.Tensor, mask: torch.Tensor, beta: float, minimum: int, maximum: int, low: int, high: int
) -> torch.Tensor:
    """How many scores exceed ``q_low + beta * (q_high - q_low)``, clamped to shares of N given in millionths.

    The quantiles are percentages; the sums are float64, in the order written.
    """
    B, N = scores.shape
    if N == 0:
        return torch.zeros(B, dtype=torch.int32, device=scores.device)
    ascending = order_key(scores, mask).argsort(dim=-1, stable=True)  # masked tokens come first
    ranked = scores.gather(-1, ascending).double()
    count = mask.sum(-1, keepdim=True)
    q_low, q_high = (
        ranked.gather(-1, (N - count + percent * (count - 1).clamp_min(0) // 100).clamp_max(N - 1))
        for percent in (low, high)
    )
    threshold = q_low + beta * (q_high - q_low)
    above = ((scores.double() > threshold) & mask).sum(-1, keepdim=True)
    least, most = ((count * share // 1_000_000).clamp_min(1) for share in (minimum, maximum))
    counts = torch.where(threshold.isfinite(), above.clamp(least, most), most)
    return counts.minimum(count).squeeze(-1).to(torch.int32)
