"""The product of the interpreter under test: in use, right, and the same for a row at any place of any tile."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import torch

from asymvlm_kernels._triton import INTERPRETED, tl, triton
from asymvlm_kernels.prefill.fold import multiply

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
