"""Rows of any length score their cosine on every backend: the squares of some leave fp32, and so do their products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_library import library_path

from asymvlm_kernels import importance_gap, prune_sequence, score_tokens, select_tokens, use_backend
from asymvlm_kernels.unproven.paths import PrefillPath, use_path

NAN, INF = float("nan"), float("inf")
SCALES = (1e20, 1.0, 1e30, 1e36, 1e-12, 1e-20, 1.0, 1e-30, 1e-36, 1e-38, 0.0)
LENGTHS = {"ordinary": 1.0, "long": 1e20, "very long": 1e36, "short": 1e-20, "very short": 1e-36, "subnormal": 3e-39}

weighted = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
wide_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
any_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


def cosines(vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """In float64."""
    vision, text = (
        rows.double() / rows.double().norm(dim=-1, keepdim=True).clamp_min(1e-300) for rows in (vision, text)
    )
    return (vision * (1.0 if weight is None else weight.double()) @ text.mT).amax(-1)


def rows(count: int, D: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """``(count, D)`` of the lengths of SCALES in turn; the last row is as large as the numbers of the dtype allow."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor(SCALES).repeat(count)[:count]
    drawn = torch.randn(count, D, generator=generator) * scales[:, None]
    drawn[-1] = drawn[-2].sign() * 3e38
    return drawn.to(device, dtype)


def weight_of(weighted: bool, D: int, device: torch.device) -> torch.Tensor | None:
    return torch.rand(D, generator=torch.Generator().manual_seed(1)).to(device) if weighted else None


@weighted
@wide_dtype
@any_backend
@pytest.mark.parametrize("D", [64, 300])
def test_vision_of_any_length(D, backend, dtype, weighted, device):
    vision, weight = rows(12, D, dtype, device)[None], weight_of(weighted, D, device)
    text = torch.randn(1, 5, D, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    with use_backend(backend):
        scores = score_tokens(vision, text, weight)
        ordinary = score_tokens(vision[:, [1, 6]], text, weight)
    torch.testing.assert_close(scores.double(), cosines(vision, text, weight), rtol=0, atol=1e-5)
    assert torch.equal(scores[:, [1, 6]], ordinary)


@weighted
@wide_dtype
@any_backend
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_text_of_any_length(length, backend, dtype, weighted, device):
    generator = torch.Generator().manual_seed(0)
    vision, text = torch.randn(1, 9, 64, generator=generator), torch.randn(1, 3, 64, generator=generator)
    text[:, 0] *= length
    text[:, 2] = 0
    vision, text, weight = vision.to(device, dtype), text.to(device, dtype), weight_of(weighted, 64, device)
    with use_backend(backend):
        scores = score_tokens(vision, text, weight)
    torch.testing.assert_close(scores.double(), cosines(vision, text, weight), rtol=0, atol=1e-5)


@wide_dtype
@any_backend
def test_the_gradient_of_rows_of_any_length(backend, dtype, device):
    vision, text = rows(11, 64, dtype, device)[None, :9], rows(11, 64, dtype, device, seed=1)[None, :9]
    weight, grad = weight_of(True, 64, device), torch.randn(1, 9, generator=torch.Generator().manual_seed(4)).to(device)
    trained, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    with use_backend(backend):
        score_tokens(vision, text, trained).backward(grad)
    cosines(vision, text, exact).backward(grad.double())
    torch.testing.assert_close(trained.grad.double(), exact.grad, rtol=0, atol=1e-5)


@any_backend
def test_what_is_not_finite_scores_nan_and_ranks_last(backend, device):
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(1, count, 16, generator=generator).to(device) for count in (6, 2))
    vision[0, 1, 3], vision[0, 2, 3], vision[0, 4, 3] = INF, -INF, NAN
    vision[0, 3] *= 1e30
    with use_backend(backend):
        scores = score_tokens(vision, text)
        assert scores.isnan().tolist() == [[False, True, True, False, True, False]]
        kept = select_tokens(scores, torch.tensor([4], device=device), capacity=4)
        gap = importance_gap(scores)
    assert kept.tolist() == [[0, 1, 3, 5]]  # of the NaN scores the first
    assert gap.isnan().tolist() == [True]  # the least of them is none


@pytest.fixture(params=["reference", "triton", "triton in one launch", "cuda"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend and path of `prune_sequence` that runs here."""
    name = request.param.split()[0]
    if name == "cuda":
        monkeypatch.setenv("ASYMVLM_CUDA_LIBRARY", library_path())
    with use_backend(name), use_path(PrefillPath(1 if "one" in request.param else 2)):
        yield request.param


@pytest.mark.parametrize(
    "length,texts,dtype,weighted",
    [
        ("ordinary", 3, torch.float32, True),
        ("long", 3, torch.bfloat16, False),
        ("very long", 3, torch.float32, False),
        ("very short", 3, torch.bfloat16, True),
        ("subnormal", 3, torch.float32, True),
        ("short", 34, torch.bfloat16, True),  # more than one block
    ],
)
def test_prune_sequence_scores_and_keeps_the_same(length, texts, dtype, weighted, path, device):
    D = 40
    vision = rows(12, D, dtype, device)[: 12 if texts < 32 else 5]
    N = len(vision)
    text = torch.randn(texts, D, generator=torch.Generator().manual_seed(3))
    text[0] *= LENGTHS[length]
    text[-1] = 0
    weight = weight_of(weighted, D, device)
    embeds = torch.cat([vision, text.to(device, dtype)])[None]
    is_vision = torch.arange(N + texts, device=device)[None] < N
    result = prune_sequence(embeds, is_vision, ~is_vision, weight, 0.5, static=True)
    expected = cosines(embeds[:, :N], embeds[:, N:], weight)
    torch.testing.assert_close(result.scores[:, :N].double(), expected, rtol=0, atol=1e-5)
    kept = result.index[result.index >= 0].tolist()
    assert kept == sorted(expected[0].argsort(descending=True, stable=True)[: result.counts].tolist()) + list(
        range(N, N + texts)
    )
