"""Greedy choices in plain PyTorch: specification, CPU path and test oracle at once.

The public functions beside this file check their arguments; these do not. The three choices read ``counts`` on the
host, so that where they stand in for a kernel on a GPU they synchronise it. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import torch

from asymvlm_kernels.prefill.reference import lift_rows
from asymvlm_kernels.ranking import order_key

TILE = 256  # rows and columns of one product, always: no library then sums a sample otherwise in another batch
LANES = 4  # partial sums of a scalar product in `dpp_map`, so that a GPU has as many loads on their way
ROUND = 8  # tokens that `drop_similar` drops at a time, at most


def cosine_matrix(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``(B, N, N)`` fp32, symmetric to the last bit: the upper tiles are computed and mirrored."""
    B, N, _ = x.shape
    out = torch.zeros((B, N, N), dtype=torch.float32, device=x.device)
    for b in range(B):
        rows, _ = lift_rows(x[b].float())
        rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)
        if mask is not None:
            rows = rows.masked_fill(~mask[b, :, None], 0.0)
        tiles = [torch.nn.functional.pad(tile, (0, 0, 0, TILE - len(tile))) for tile in rows.split(TILE)]
        for i, first in enumerate(tiles):
            for j, second in enumerate(tiles[i:], i):
                product = first @ second.mT
                if i == j:
                    product = product.triu() + product.triu(1).mT
                at, beside = slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE)
                out[b, at, beside] = product[: N - i * TILE, : N - j * TILE]
                out[b, beside, at] = product[: N - i * TILE, : N - j * TILE].mT
    return out


def farthest_points(similarity: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    """At first the largest distance to the nearest other token, then the largest to the nearest chosen one."""
    B, N, _ = similarity.shape
    free = _free(similarity, mask)
    chosen = torch.zeros((B, N), dtype=torch.bool, device=similarity.device)
    if N == 0:
        return chosen
    unknown = similarity.diagonal(dim1=1, dim2=2).isnan()
    others = free[:, None] & ~torch.eye(N, dtype=torch.bool, device=similarity.device)
    distance = _nearest(1.0 - similarity, others)
    for step in range(_most(counts, N)):
        token = order_key(distance.masked_fill(unknown, float("nan")), free & ~chosen).argmax(-1, keepdim=True)
        chosen |= _taken(token, (free & ~chosen).any(-1) & (step < counts), N)
        found = 1.0 - similarity.gather(1, token[..., None].expand(B, 1, N))[:, 0]
        found = found.masked_fill(found.isnan(), float("inf"))
        distance = found if step == 0 else distance.minimum(found)
    return chosen


def _nearest(distance: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``(B, N)``: the smallest of each row among ``others``, +inf where there is none. A NaN is no distance."""
    return distance.masked_fill(~others | distance.isnan(), float("inf")).amin(-1)


def dpp_map(kernel: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor, capacity: int) -> torch.Tensor:
    """The largest gain ``d_i^2`` each time, by the incremental Cholesky factor of arXiv:1709.05135, Algorithm 1.

    ``e_i = (L_ji - <c_j, c_i>) / d_j``, then ``c_i = [c_i, e_i]`` and ``d_i^2 -= e_i^2``. The scalar product is a sum
    of `LANES` lanes: lane ``r`` adds the terms ``r``, ``r + LANES``, ... in this order.
    """
    B, N, _ = kernel.shape
    free = _free(kernel, mask)
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    gain = diagonal.clone()
    chosen = torch.zeros((B, N), dtype=torch.bool, device=kernel.device)
    steps = min(_most(counts, N), capacity)
    factor = torch.zeros((B, -(-steps // LANES) * LANES, N), dtype=torch.float32, device=kernel.device)
    for step in range(steps):
        token = order_key(gain, free & ~chosen).argmax(-1, keepdim=True)
        peak = gain.gather(-1, token)
        grows = (free & ~chosen).any(-1, keepdim=True) & (peak > 0) & (step < counts)[:, None]
        row = kernel.gather(1, token[..., None].expand(B, 1, N))[:, 0]
        # by float64: on a CPU PyTorch's fp32 root has another last bit than the nearest one in 1 of 7 cases
        root = torch.where(grows, peak, 1.0).double().sqrt().float()
        part = (row - _products(factor, token, step)) / root
        factor[:, step] = part.masked_fill(~grows, 0.0)
        gain = torch.where(grows, gain - part * part, gain)
        chosen |= _taken(token, grows[:, 0], N)
    missing = counts.clamp(0, capacity) - chosen.sum(-1)  # no gain is left: the largest diagonals
    order = order_key(diagonal, free & ~chosen).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(N, device=order.device).expand(B, N))
    return chosen | (free & ~chosen & (rank < missing[:, None]))


def _products(factor: torch.Tensor, token: torch.Tensor, step: int) -> torch.Tensor:
    """``<c_token, c_i>`` over the first ``step`` terms, ``(B, N)``: products rounded before they are added."""
    B, _, N = factor.shape
    lanes = torch.zeros((B, LANES, N), dtype=torch.float32, device=factor.device)
    for start in range(0, step, LANES):
        terms = factor[:, start : start + LANES]
        lanes += terms * terms.gather(-1, token[:, None].expand(B, LANES, 1))
    return (lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3])


def drop_similar(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of the tokens at even places in rank, those most similar to one at an odd place go, until ``counts`` are left."""
    B, N, _ = similarity.shape
    left = torch.zeros((B, N), dtype=torch.bool, device=similarity.device)
    for b, count in enumerate(counts.tolist()):
        rest = order[b][order[b] >= 0]
        while len(rest) > max(count, 0):
            even, odd = rest[::2], rest[1::2]
            near = similarity[b].index_select(0, even).index_select(1, odd)
            best = near.nan_to_num_(float("-inf"), float("inf"), float("-inf"))
            best = best.amax(-1) if len(odd) else best.new_full((len(even),), float("-inf"))
            best = best.masked_fill(similarity[b][even, even].isnan(), float("inf"))  # what nobody knows goes first
            gone = order_key(best, None).argsort(descending=True, stable=True)[: min(ROUND, len(rest) - max(count, 0))]
            stays = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
            stays[2 * gone] = False
            rest = rest[stays]
        left[b, rest] = True
    return left


def _free(matrix: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return matrix.new_ones(matrix.shape[:2], dtype=torch.bool) if mask is None else mask


def _most(counts: torch.Tensor, N: int) -> int:
    return min(max(int(counts.max()), 0), N) if counts.numel() else 0


def _taken(token: torch.Tensor, when: torch.Tensor, N: int) -> torch.Tensor:
    """``(B, N)`` bool: True at ``token`` of the rows ``when``."""
    return (torch.arange(N, device=token.device) == token) & when[:, None]
