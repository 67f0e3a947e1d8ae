"""Greedy choices: each against its rule in plain loops, the same tokens on every backend and in any batch."""

from __future__ import annotations

import re

import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels import use_backend

any_backend = pytest.mark.parametrize("backend", ["reference", "triton"])
NAN = float("nan")
CHOICES = {"farthest_points": ak.farthest_points, "dpp_map": ak.dpp_map}


def tokens(B: int, N: int, D: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which some repeat, so that ties occur, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, D, generator=generator)
    x[:, N // 2 : N // 2 + N // 8] = x[:, : N // 8]
    return x, torch.rand(B, N, generator=generator) < 0.85


def relevance_kernel(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    weight = torch.linspace(0.0, 1.0, x.shape[1])
    return weight[:, None] * ak.cosine_matrix(x, mask) * weight


def naive_farthest(similarity: torch.Tensor, real: list[int], count: int) -> set[int]:
    distance = (1.0 - similarity).tolist()
    chosen: list[int] = []
    while len(chosen) < min(count, len(real)):
        best, most = -1, -float("inf")
        for i in (i for i in real if i not in chosen):
            others = chosen or [j for j in real if j != i]
            nearest = min((distance[i][j] for j in others), default=float("inf"))
            if best < 0 or nearest > most:
                best, most = i, nearest
        chosen.append(best)
    return set(chosen)


def naive_dpp(kernel: torch.Tensor, real: list[int], count: int) -> set[int]:
    """By determinants, in float64: the gain of a token is a quotient of two of them."""
    kernel, chosen = kernel.double(), []
    while len(chosen) < min(count, len(real)):
        before = torch.linalg.det(kernel[chosen][:, chosen])
        rest = [i for i in real if i not in chosen]
        gains = [float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) / before) for i in rest]
        chosen.append(rest[gains.index(max(gains))])
    return set(chosen)


def naive_drop(similarity: torch.Tensor, order: list[int], count: int) -> set[int]:
    rest = [i for i in order if i >= 0]
    while len(rest) > count:
        best = {i: max((float(similarity[i, j]) for j in rest[1::2]), default=0.0) for i in rest[::2]}
        gone = sorted(best, key=lambda i: -best[i])[: min(8, len(rest) - count)]
        rest = [i for i in rest if i not in gone]
    return set(rest)


def found(chosen: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in chosen.cpu()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosines_are_those_of_normalised_rows_however_large(dtype, device):
    x, mask = tokens(2, 300, 40)
    x[0, :3] *= torch.tensor([1e30, 1e-30, 0.0])[:, None]
    mask[0, :3] = True
    x = x.to(device, dtype)
    matrix = ak.cosine_matrix(x, mask.to(device)).cpu()
    unit = torch.nn.functional.normalize(x.cpu().double(), dim=-1, eps=1e-200) * mask[..., None]
    assert (matrix - unit @ unit.mT).abs().max() < 1e-6
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(ak.cosine_matrix(x[1:], mask[1:].to(device)).cpu()[0], matrix[1])


@any_backend
@pytest.mark.parametrize("B,N", [(1, 1), (3, 37), (1, 150)])
def test_farthest_points_are_those_of_the_rule(B, N, backend, device):
    x, mask = tokens(B, N)
    similarity, counts = ak.cosine_matrix(x, mask), torch.tensor([N // 3, N, -1][:B])
    expected = [naive_farthest(similarity[b], mask[b].nonzero()[:, 0].tolist(), int(counts[b])) for b in range(B)]
    with use_backend(backend):
        chosen = ak.farthest_points(similarity.to(device), mask.to(device), counts.to(device))
    assert found(chosen) == expected


@any_backend
def test_dpp_map_takes_the_largest_determinant_each_time(backend, device):
    x, mask = tokens(2, 37, 16)
    kernel, counts = relevance_kernel(x, mask), torch.tensor([5, 11])
    expected = [naive_dpp(kernel[b], mask[b].nonzero()[:, 0].tolist(), int(counts[b])) for b in range(2)]
    with use_backend(backend):
        chosen = ak.dpp_map(kernel.to(device), mask.to(device), counts.to(device), capacity=11)
    assert found(chosen) == expected


@any_backend
def test_where_no_gain_is_left_the_largest_diagonals_fill_up(backend, device):
    rank_3 = torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 0, 0], [0, 0, 4], [0, 0, 3], [0, 2, 0], [0, 0, 0]])
    kernel = (rank_3 @ rank_3.T)[None].to(device)
    with use_backend(backend):
        for count, expected in ((3, {0, 1, 3}), (4, {0, 1, 3, 4}), (5, {0, 1, 3, 4, 5}), (7, set(range(7)))):
            assert found(ak.dpp_map(kernel, None, torch.tensor([count], device=device))) == [expected]


@any_backend
@pytest.mark.parametrize("N", [1, 2, 60])
def test_drop_similar_leaves_what_the_rule_leaves(N, backend, device):
    x, mask = tokens(3, N)
    similarity = ak.cosine_matrix(x)
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(3)])
    order = order.masked_fill(~mask.gather(1, order), -1)
    counts = torch.tensor([0, N // 3, N])
    expected = [naive_drop(similarity[b], order[b].tolist(), int(counts[b])) for b in range(3)]
    with use_backend(backend):
        left = ak.drop_similar(similarity.to(device), order.to(device), counts.to(device))
    assert found(left) == expected


def test_kernels_choose_what_the_reference_chooses_bit_for_bit(device):
    """With 21 choices every lane of a sum has terms; a difference in one last bit would part the two."""
    x, mask = tokens(2, 40, 6)  # of rank 6: behind that gains are noise, the same noise
    similarity, counts = ak.cosine_matrix(x, mask).to(device), torch.tensor([21, 9], device=device)
    kernel, mask = (similarity + 0.01 * torch.eye(40, device=device)), mask.to(device)
    order = torch.arange(40, device=device).expand(2, -1).masked_fill(~mask, -1)
    results = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            drop = ak.drop_similar(similarity, order, counts)
            noise = ak.dpp_map(similarity[1:], mask[1:], counts[1:] + 3)
            results.append(
                [ak.farthest_points(similarity, mask, counts), ak.dpp_map(kernel, mask, counts), drop, noise]
            )
            alone = ak.dpp_map(kernel[1:], mask[1:], counts[1:])
            assert torch.equal(alone[0], results[-1][1][1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@any_backend
def test_tokens_that_are_not_numbers_come_last(backend, device):
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    x[0, 3] = NAN
    similarity, most = ak.cosine_matrix(x).to(device), torch.tensor([19], device=device)
    order = torch.arange(20, device=device).flip(0)[None].clone()
    order[0, 0], order[0, 16] = 3, 19  # the unknown one at an even place, first in rank
    with use_backend(backend):
        assert found(ak.farthest_points(similarity, None, most)) == [set(range(20)) - {3}]
        assert found(ak.dpp_map(similarity, None, most)) == [set(range(20)) - {3}]
        assert found(ak.drop_similar(similarity, order, most)) == [set(range(20)) - {3}]
        assert found(ak.farthest_points(similarity, None, most + 1)) == [set(range(20))]
        assert found(ak.dpp_map(similarity, None, most + 1)) == [set(range(20))]


@any_backend
@pytest.mark.parametrize("name", CHOICES)
def test_nothing_to_choose_from(name, backend, device):
    with use_backend(backend):
        choose = CHOICES[name]
        none = torch.zeros(2, dtype=torch.int64, device=device)
        matrix, hidden = torch.eye(5, device=device).repeat(2, 1, 1), torch.zeros(2, 5, dtype=torch.bool, device=device)
        assert not choose(matrix, None, none).any()
        assert not choose(matrix, hidden, none + 3).any()
        assert choose(torch.zeros(0, 5, 5, device=device), None, none[:0]).shape == (0, 5)
        assert choose(torch.zeros(2, 0, 0, device=device), None, none + 1).shape == (2, 0)


def wrong_arguments() -> dict[str, object]:
    matrix, counts, order = torch.zeros(2, 5, 5), torch.ones(2, dtype=torch.int64), torch.zeros(2, 4).long()
    return {
        "x must have shape (B, N, D), got (5, 5)": lambda: ak.cosine_matrix(matrix[0]),
        "similarity must be square, (B, N, N), got (2, 4, 5)": lambda: ak.farthest_points(matrix[:, :4], None, counts),
        "similarity must be float32, got float64": lambda: ak.drop_similar(matrix.double(), order, counts),
        "counts must have shape (2,), got (1,)": lambda: ak.dpp_map(matrix, None, counts[:1]),
        "mask must be bool, got int64": lambda: ak.dpp_map(matrix, torch.ones(2, 5).long(), counts),
        "capacity must be 0 or more, got -1": lambda: ak.dpp_map(matrix, None, counts, capacity=-1),
        "order must be int64, got int32": lambda: ak.drop_similar(matrix, order.int(), counts),
        "order must be in [-1, 5), got 5": lambda: ak.drop_similar(matrix, order + 5, counts),
    }


@pytest.mark.parametrize("message", wrong_arguments())
def test_a_wrong_argument_is_told(message):
    with pytest.raises((ValueError, IndexError), match=f"^{re.escape(message)}$"):
        wrong_arguments()[message]()
