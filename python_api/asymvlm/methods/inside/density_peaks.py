"""Clusters by density peaks among k nearest neighbours: centres are dense, and far from anything denser."""

from __future__ import annotations

import torch


def density_peaks(rows: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster the rows of one sample.

    With distances d divided by the square root of the width, and as many neighbours as clusters, the row itself among
    them: density ``exp(-mean d^2)`` to the neighbours; separation, the least d to a denser row, or the largest d of all
    where none is denser. Rows with the largest product are the centres, and each row joins the nearest centre.

    Args:
        rows: ``(n, D)``. clusters: c, from 1 to n.
    Returns:
        ``(c,)`` int64, ascending: which rows are centres, and ``(n,)`` int64: the cluster of each row, from 0. Of equal
        rows the first is denser, and of equal centres the first is nearer.
    """
    rows = rows.float()
    distance = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    distance = (distance + distance.T) / 2  # equal from both sides, and 0 to itself, to the bit
    distance.fill_diagonal_(0)
    density = (-distance.sort(1).values[:, :clusters].square().mean(1)).exp()
    place = torch.arange(len(rows), device=rows.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (place < place[:, None]))
    separation = distance.masked_fill(~denser, torch.inf).amin(1).clamp_max(distance.amax())
    order = (separation * density).sort(descending=True, stable=True).indices
    centres = order[:clusters].sort().values
    member = distance[:, centres].argmin(1)
    member[centres] = place[:clusters]
    return centres, member


def cluster_means(rows: torch.Tensor, member: torch.Tensor, clusters: int) -> torch.Tensor:
    """``(c, D)``, fp32 at least: the mean of each cluster's rows ``(n, D)``."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    belongs = (member == torch.arange(clusters, device=rows.device)[:, None]).to(rows)
    return belongs @ rows / belongs.sum(1, keepdim=True)
