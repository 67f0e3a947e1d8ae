"""The product of the interpreter under test: in use, right, and the same for a row at any place of any tile."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import torch

from asymvlm_kernels._triton import INTERPRETED, tl, triton
from asymvlm_kernels.device import multiply

NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU")


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    offs_m, offs_k, offs_n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)
    a = tl.load(a_ptr + offs_m * K + offs_k[None, :])
    b = tl.load(b_ptr + offs_n[:, None] * K + offs_k[None, :])
    tl.store(out_ptr + offs_m * N + offs_n[None, :], multiply(a, tl.trans(b), tl.zeros((M, N), tl.float32)))


def interpreted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.mT`` by a kernel."""
    out = torch.empty(len(a), len(b))
    _product_kernel[(1,)](a.contiguous(), b.contiguous(), out, len(a), a.shape[1], len(b))
    return out


def operands(M: int, K: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(K)
    return torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)


def test_the_interpreter_multiplies_by_it():
    a, b = operands(32, 256, 64)
    result = interpreted(a, b)
    assert torch.equal(result, torch.from_numpy(interpreter.product(a.numpy(), b.numpy().T)))
    assert not torch.equal(result, torch.from_numpy(a.numpy() @ b.numpy().T))  # BLAS has another order: hence all this
    exact = a.double() @ b.double().mT
    assert (result - exact).abs().max() < 2**-18 * exact.abs().max()


@pytest.mark.parametrize("K", [1, 2, 16, 32, 64, 128, 256])
def test_a_row_and_a_column_have_the_same_bits_at_any_place_of_any_tile(K):
    a, b = operands(64, K, 64)
    whole = interpreted(a, b)
    for shift in (1, 5, 17, 40):
        assert torch.equal(interpreted(a.roll(shift, 0), b), whole.roll(shift, 0))
        assert torch.equal(interpreted(a, b.roll(shift, 0)), whole.roll(shift, 1))
    assert torch.equal(interpreted(a[32:48], b), whole[32:48])
    assert torch.equal(interpreted(a, b[16:32]), whole[:, 16:32])
    assert torch.equal(interpreted(a[7:8], b[9:10]), whole[7:8, 9:10])


def test_operands_in_any_order_in_memory_have_the_same_bits():
    a, b = (x.numpy() for x in operands(16, 64, 32))
    expected = interpreter.product(a, b.T)
    assert np.array_equal(interpreter.product(np.asfortranarray(a), np.ascontiguousarray(b.T)), expected)


@triton.jit
def _convert_kernel(x_ptr, narrow_ptr, wide_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    narrow = tl.load(x_ptr + offs).to(tl.bfloat16)
    tl.store(narrow_ptr + offs, narrow)
    tl.store(wide_ptr + offs, narrow.to(tl.float32))


def test_bf16_is_rounded_to_the_nearest_as_on_a_gpu():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:2048] |= 0x8000  # many halfway between two numbers of bf16
    bits[:1024] &= -32768
    values = torch.cat([bits.view(torch.float32)[:-6], torch.tensor([0.0, -0.0, 3.4e38, INF, -INF, NAN])])
    narrow, wide = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    _convert_kernel[(1,)](values, narrow, wide, 4096)
    expected = values.to(torch.bfloat16)
    assert torch.equal(narrow.isnan(), expected.isnan())
    assert torch.equal(narrow.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(wide.nan_to_num(7.0), expected.float().nan_to_num(7.0))
