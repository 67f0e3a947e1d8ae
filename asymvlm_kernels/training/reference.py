"""Key-bias attention in plain PyTorch: specification, CPU path and test oracle at once.

Axes: B batch, S sequence, H query heads, G key/value heads, head_dim. Rows of queries are taken in chunks, so that no
S x S tensor of all heads exists, forward or backward. fp32 inside (float64 for float64); probabilities are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

ROWS = 256  # query rows of one product


def key_bias_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T * scale + bias) v`` under a causal mask: the output ``(B, S, H, head_dim)``, and the logarithm of
    each row's sum ``(B, H, S)``. A row that sees no finite key gives zeros, and -inf."""
    B, S, H, D = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((B, H, S), dtype=bias.dtype)
    for rows, logits in _logits(q, k, bias, scale):
        sums = logits.logsumexp(-1)  # (B, G, R, rows)
        weights = (logits - sums[..., None]).exp().nan_to_num(nan=0.0)
        part = torch.einsum("bgrms,bsgd->bmgrd", weights, v.to(bias.dtype))
        out[:, rows] = part.flatten(2, 3).to(q.dtype)
        lse[:, :, rows] = sums.flatten(1, 2)
    return out, lse


def key_bias_attention_grad(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v in their dtype and of the bias, summed over heads and queries, in fp32."""
    B, S, H, D = q.shape
    G, wide = k.shape[2], bias.dtype
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    grad_bias = torch.zeros_like(bias)
    for rows, logits in _logits(q, k, bias, scale):
        weights = (logits - _grouped(lse[:, :, rows], G)[..., None]).exp().nan_to_num(nan=0.0)  # (B, G, R, rows, S)
        given = grad[:, rows].to(wide).unflatten(2, (G, H // G))  # (B, rows, G, R, head_dim)
        grad_v += torch.einsum("bgrms,bmgrd->bsgd", weights, given)
        delta = (given * out[:, rows].to(wide).unflatten(2, (G, H // G))).sum(-1).permute(0, 2, 3, 1)
        change = weights * (torch.einsum("bmgrd,bsgd->bgrms", given, v.to(wide)) - delta[..., None])
        grad_bias += change.sum((1, 2, 3))
        queries = q[:, rows].to(wide).unflatten(2, (G, H // G))
        grad_k += torch.einsum("bgrms,bmgrd->bsgd", change, queries) * scale
        part = torch.einsum("bgrms,bsgd->bmgrd", change, k.to(wide)) * scale
        grad_q[:, rows] = part.flatten(2, 3).to(q.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


def _logits(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Chunks of query rows with their logits ``(B, G, H // G, rows, S)``."""
    S, H, G = q.shape[1], q.shape[2], k.shape[2]
    places = torch.arange(S, device=q.device)
    keys = k.to(bias.dtype)
    for start in range(0, S, ROWS):
        rows = slice(start, min(start + ROWS, S))
        queries = q[:, rows].to(bias.dtype).unflatten(2, (G, H // G))
        logits = torch.einsum("bmgrd,bsgd->bgrms", queries, keys) * scale + bias[:, None, None, None]
        yield rows, logits.masked_fill_(places > places[rows, None], float("-inf"))


def _grouped(lse: torch.Tensor, G: int) -> torch.Tensor:
    return lse.unflatten(1, (G, lse.shape[1] // G))
