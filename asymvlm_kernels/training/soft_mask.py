"""A differentiable stand-in for pruning: ``m_i = -C * sigmoid((theta - s_i) / tau)`` (AsymVLM, Eq. 2 and appendix C).

Added to the attention logits of a key, it leaves tokens above ``theta`` nearly alone and takes weight from those below.
``theta`` is the score of the last token that a budget of K would keep.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_mask, check_number, check_shape
from asymvlm_kernels.ranking import order_key


def soft_mask(
    scores: torch.Tensor,
    counts: torch.Tensor,
    mask: torch.Tensor,
    *,
    strength: float = 5.0,
    temperature: float = 1.0,
    theta_grad: bool = True,
) -> torch.Tensor:
    """Penalty of every key of a sequence, differentiable in ``scores``.

    Args:
        scores: ``(B, S)`` fp32 importance scores; values outside ``mask`` are ignored.
        counts: ``(B,)`` integer, K: tokens a hard selection would keep. A row with K = 0 gets no penalty.
        mask: ``(B, S)`` bool, True = prunable vision token.
        strength: C > 0, in units of attention logits: the largest penalty.
        temperature: tau > 0, in units of scores.
        theta_grad: let the gradient flow through ``theta`` too. Detached (the paper), raising all scores lowers every
            penalty, which promotes the most numerous tokens instead of the best.
    Returns:
        ``(B, S)`` fp32: 0 outside ``mask``, in ``(-strength, 0)`` inside. A score that is not finite gets the whole
        penalty and passes no gradient; a row whose ``theta`` is not finite gets none at all.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or a ``strength`` or ``temperature`` that is not positive
            and finite.

    Does not synchronise. Source: Eq. 2 and appendix C of arXiv:2605.29535; ``theta_grad`` is ours.
    """
    check_shape("scores", scores, ("B", "S"))
    check_dtype("scores", scores, (torch.float32, torch.float64))
    check_mask("mask", mask, scores)
    check_shape("counts", counts, (scores.shape[0],))
    check_device("counts", counts, scores)
    for name, value in (("strength", strength), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        check_number(name, value)
    if scores.shape[1] == 0:
        return torch.zeros_like(scores)
    usable = mask & scores.isfinite()
    safe = torch.where(usable, scores, 0.0)  # -inf would turn the gradient into NaN
    order = order_key(scores.detach().float(), mask).argsort(dim=-1, descending=True, stable=True)
    counts = counts.to(torch.int64)[:, None]
    last = order.gather(-1, (counts - 1).clamp(0, scores.shape[1] - 1))  # place of the K-th best
    theta = safe.gather(-1, last)
    theta = theta if theta_grad else theta.detach()
    penalty = torch.where(usable, -strength * torch.sigmoid((theta - safe) / temperature), -strength)
    return torch.where(mask & (counts > 0) & usable.gather(-1, last), penalty, 0.0)


__all__ = ["soft_mask"]
