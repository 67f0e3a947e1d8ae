"""gather_rows moves bits: every dtype, every stride, every padding value, and offsets past 2**31."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from asymvlm_kernels import gather_rows, use_backend
from asymvlm_kernels.prefill import reference

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern may occur, NaNs with payload too; bool has two."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.tensor([], dtype=dtype).itemsize
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def check(rows: torch.Tensor, index: torch.Tensor, pad: float = 0) -> None:
    result = gather_rows(rows, index, pad=pad)
    expected = reference.gather_rows(rows, index, pad)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert result.is_contiguous()
    assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B,S,K,D", [(1, 1, 1, 1), (2, 9, 5, 70), (3, 37, 20, 1), (1, 40, 17, 3072)])
def test_every_dtype_is_copied_bit_for_bit(B, S, K, D, dtype, device):
    torch.manual_seed(0)
    rows = random_bits((B, S, D), dtype).to(device)
    check(rows, torch.randint(-1, S, (B, K), device=device))


@pytest.mark.parametrize("tail", [(), (3,), (3, 5), (2, 3, 4)])
def test_any_number_of_trailing_axes(tail, device):
    torch.manual_seed(0)
    check(torch.randn(2, 11, *tail, device=device), torch.randint(-1, 11, (2, 7), device=device))


@pytest.mark.parametrize("D", [8, 64, 72])
def test_any_stride(D, device):
    torch.manual_seed(0)
    index = torch.randint(-1, 9, (2, 6), device=device)
    wide = torch.randn(4, 20, 2 * D + 1, device=device).bfloat16()
    check(wide[::2, 1:10, :D], index)  # rows apart
    check(wide[1:3, :9, 1 : D + 1], index)  # base not aligned to 16 bytes
    check(wide[:2, :9, : 2 * D : 2], index)  # last axis strided
    check(wide[:2, :9, :D].transpose(0, 1).contiguous().transpose(0, 1), index)  # batch inside
    check(wide[:1, :9, :D].expand(2, 9, D), index)  # batch of stride 0
    check(wide[:2, :9, :D].mT.contiguous().mT, index)  # columns outside
    check(torch.randn(3, 2, 9, device=device).permute(1, 2, 0), index)  # stacked M-RoPE positions
    check(wide[:2, :9, :D].unflatten(-1, (2, D // 2)).mT, index)  # trailing axes that are not one axis in memory


def test_strided_index(device):
    rows = torch.randn(2, 9, 16, device=device)
    check(rows, torch.randint(-1, 9, (6, 2), device=device).mT)
    check(rows, torch.randint(-1, 9, (1, 6), device=device).expand(2, 6))


@pytest.mark.parametrize(
    "dtype,pad",
    [
        (torch.float32, 0.1),
        (torch.float64, 0.1),
        (torch.bfloat16, 0.1),
        (torch.float16, -65504.0),
        (torch.float32, float("-inf")),
        (torch.float32, float("nan")),
        (torch.float32, -0.0),
        (torch.int64, 2**53 + 1),
        (torch.int64, -(2**63)),
        (torch.int32, -1),
        (torch.uint8, 255),
        (torch.bool, True),
        (torch.float8_e5m2, -0.0),
        (torch.float8_e4m3fn, 1.5),
        (torch.uint16, 2**16 - 1),
        (torch.uint64, 2**63 - 1),
    ],
    ids=str,
)
def test_padding_value_is_exact(dtype, pad, device):
    rows = torch.ones(1, 3, 5, device=device).to(dtype)
    check(rows, torch.tensor([[-1, 2, -1]], device=device), pad=0)  # 0 first: -0 must not be taken for it
    check(rows, torch.tensor([[-1, 2, -1]], device=device), pad=pad)


@pytest.mark.parametrize("B,S,K,D", [(0, 3, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0), (2, 0, 2, 4)])
def test_empty_axes(B, S, K, D, device):
    check(torch.randn(B, S, D, device=device), torch.full((B, K), -1, device=device), pad=7)


def test_offsets_past_two_to_the_31(device):
    # 2 GiB of address space; on a CPU only the pages that are touched become memory
    far = 2**31 + 4096
    if device.type == "cuda":
        storage = torch.zeros(far + 4096, dtype=torch.uint8, device=device)
    else:
        storage = torch.from_numpy(np.empty(far + 4096, dtype=np.uint8))
    storage[: 2 * 64] = 1
    storage[far : far + 2 * 64] = 2
    index = torch.tensor([[1, 0], [0, 1]], device=device)
    by_batch = storage.as_strided((2, 2, 64), (far, 64, 1))
    assert gather_rows(by_batch, index).flatten(1).unique(dim=1).flatten().tolist() == [1, 2]
    by_row = storage.as_strided((1, 2, 64), (64, far, 1))
    assert gather_rows(by_row, index[:1])[0, :, 0].tolist() == [2, 1]
    by_column = storage.as_strided((1, 1, 2), (1, 1, far))
    assert gather_rows(by_column, torch.zeros(1, 1, dtype=torch.int64, device=device)).tolist() == [[[1, 2]]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_dtype_against_numpy(backend, device):
    torch.manual_seed(0)
    index = torch.tensor([[4, -1, 0], [2, 2, -1]], device=device)
    for dtype in DTYPES:
        rows = random_bits((2, 5, 3), dtype).to(device)
        with use_backend(backend):
            result = bits(gather_rows(rows, index)).view(2, 3, -1)
        words = bits(rows).view(2, 5, -1)
        wanted = torch.zeros_like(result)
        for b, k in (index >= 0).nonzero().tolist():
            wanted[b, k] = words[b, index[b, k]]
        assert torch.equal(result, wanted), dtype


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("wrong", [-2, 5, 2**40])
def test_a_row_that_is_not_there_is_refused_on_a_cpu(wrong, backend):
    rows, index = torch.zeros(2, 5, 3), torch.tensor([[0, 4], [wrong, -1]])
    with use_backend(backend), pytest.raises(IndexError, match=re.escape(f"index must be in [-1, 5), got {wrong}")):
        gather_rows(rows, index)
