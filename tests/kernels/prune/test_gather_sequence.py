"""Second launch of prune_sequence: every tensor of the sequence moved bit for bit, padding on the chosen side."""

from __future__ import annotations

import pytest
import torch

from asymvlm_kernels.prefill.prune import two_launches

DTYPES = (torch.bool, torch.int16, torch.float32, torch.int64, torch.bfloat16, torch.float64, torch.int32, torch.uint8)


def case(B, S, D, dtype, device):
    generator = torch.Generator().manual_seed(B * S + D)
    order = torch.zeros(B, S, dtype=torch.int32)
    lengths = torch.randint(0, S + 1, (B,), generator=generator, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        order[row, :length] = torch.randperm(S, generator=generator)[:length].sort().values
        order[row, length:] = 10**6  # beyond the length nothing is read
    embeds = torch.randn(B, S, D, generator=generator).to(dtype)
    return tuple(tensor.to(device) for tensor in (embeds, order, lengths))


def assert_same(result, expected):
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    for got, want in zip(result[2], expected[2], strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert torch.equal(got.nan_to_num(3), want.nan_to_num(3))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "B,S,D,dtype", [(1, 1, 1, torch.float32), (3, 40, 70, torch.bfloat16), (2, 600, 8, torch.half)]
)
def test_moves_every_tensor(B, S, D, dtype, left, device):
    embeds, order, lengths = case(B, S, D, dtype, device)
    carry = [torch.randint(0, 2, (B, S), device=device).to(dtype) for dtype in DTYPES]
    pads = [True, -3, float("nan"), -100, 1.5, -0.0, 7, 200]
    for capacity in (S, int(lengths.max()), S + 5):
        arguments = (embeds, order, lengths, carry, pads, [False] * 8, capacity, left)
        assert_same(
            two_launches._gather_sequence_triton(*arguments), two_launches._gather_sequence_reference(*arguments)
        )


def test_shapes_of_carried_tensors(device):
    B, S = 2, 30
    embeds, order, lengths = case(B, S, 24, torch.float32, device)
    carry = [
        torch.randint(99, (3, B, S), device=device),  # M-RoPE positions
        torch.randn(B, S, 5, device=device),
        torch.randn(B, S, 2, 3, device=device),
        torch.randn(S, B, device=device).T,
        torch.randint(99, (1, S), device=device).expand(B, S),
        torch.randn(B, S, 4, device=device).mT.contiguous().mT,
    ]
    stacked = [True] + [False] * 5
    arguments = (embeds, order, lengths, carry, [0, 1, 2, 3, 4, 5], stacked, S, True)
    assert_same(two_launches._gather_sequence_triton(*arguments), two_launches._gather_sequence_reference(*arguments))


def test_strided_embeddings_and_no_carry(device):
    _, order, lengths = case(2, 20, 16, torch.float32, device)
    embeds = torch.randn(2, 41, 33, device=device)[:, 1::2, 1::2]
    arguments = (embeds, order, lengths, [], [], [], 20, False)
    assert_same(two_launches._gather_sequence_triton(*arguments), two_launches._gather_sequence_reference(*arguments))
