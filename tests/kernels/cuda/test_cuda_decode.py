"""The decode kernels of the CUDA library: merged attention and scores (csrc/merge.cu), slots that move."""

from __future__ import annotations

import pytest
import torch
from cuda_library import Emulated, emulated

from asymvlm_kernels import flash_attn_with_kvcache, move_slots_, plan_moves, use_backend
from asymvlm_kernels._triton import INTERPRETED
from asymvlm_kernels.decode import reference
from asymvlm_kernels.decode.logits import NO_BOUNDS
from asymvlm_kernels.testing import DTYPES
from asymvlm_kernels.unproven.cuda import library as cuda
from asymvlm_kernels.unproven.cuda.decode import merge_parts_cuda

INF = float("inf")
LOG2E = 1.4426950408889634
pytestmark = pytest.mark.usefixtures("cuda_library")
needs_triton = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton cannot run here")


def parts_of(logits: torch.Tensor, v: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a first launch leaves of ``(B, H, Q, S)`` logits: partial outputs and logsumexps, base 2."""
    outs, sums = [], []
    for part, value in zip(logits.chunk(parts, -1), v.chunk(parts, 1), strict=True):
        sums.append(part.double().logsumexp(-1).float() * LOG2E)
        weights = part.double().softmax(-1).nan_to_num(0.0).float()
        out = weights @ value.permute(0, 2, 1, 3)
        outs.append(out.masked_fill_((sums[-1] == -INF)[..., None], float("nan")))  # never written
    return torch.stack(outs, -2), torch.stack(sums, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B,H,Q,S,D,parts,scored",
    [
        *((1, 1, 1, 1, 8, 1, 1), (2, 6, 1, 300, 40, 4, 1), (1, 4, 3, 64, 128, 2, 2)),
        *((1, 300, 1, 20, 16, 2, 1), (1, 2, 1, 9, 8, 3, 0)),  # more rows than threads; no scores
    ],
)
def test_parts_become_output_and_scores(B, H, Q, S, D, parts, scored, dtype, device):
    generator = torch.Generator().manual_seed(S)
    logits = torch.randn(B, H, Q, S, generator=generator) * 4
    v = torch.randn(B, S, H, D, generator=generator)
    leftpad = torch.tensor([S // 4, 0][:B], dtype=torch.int64)
    seqlens = torch.tensor([S, S // 2][:B], dtype=torch.int32)
    slot = torch.arange(S)
    seen = (slot >= leftpad[:, None]) & (slot < seqlens[:, None])
    logits.masked_fill_(~seen[:, None, None], -INF)
    partial, sums = parts_of(logits, v, parts)
    last = logits[:, :, Q - scored :].reshape(B, H * scored, S) * LOG2E
    last.masked_fill_(~seen[:, None], float("nan"))  # never written
    out, lse = torch.empty(B, Q, H, D, dtype=dtype, device=device), torch.empty(B, H, Q, device=device)
    scores = torch.empty(B, S if scored else 0, device=device)
    moved = [x.to(device).contiguous() for x in (partial, sums, last, seqlens, leftpad)]
    merge_parts_cuda(*moved[:2], moved[2] if scored else None, *moved[3:], NO_BOUNDS, out, lse, scores)
    weights = logits.double().softmax(-1).nan_to_num(0.0)
    wanted = (weights @ v.double().permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
    total = logits.double().logsumexp(-1).float()
    torch.testing.assert_close(lse.cpu(), total.masked_fill(total == -INF, INF), rtol=1e-6, atol=1e-6)
    if scored:
        torch.testing.assert_close(
            scores.cpu().double(), weights[:, :, Q - scored :].mean((1, 2)), rtol=1e-5, atol=1e-7
        )
        assert bool((scores.cpu()[~seen] == 0).all())


def test_a_row_without_a_slot_is_zero_and_windows_are_by_slot(device):
    logits = torch.full((1, 2, 1, 8), -INF)
    logits[0, 1, 0, 5:] = torch.tensor([1.0, 2.0, 0.5])  # head 0 sees nothing; the window is 3 slots
    v = torch.ones(1, 8, 2, 4)
    partial, sums = parts_of(logits, v, 2)
    written = torch.full((1, 2, 8), float("nan"))
    written[..., 5:] = logits[:, :, 0, 5:] * LOG2E
    out, lse, scores = (torch.empty(*size, device=device) for size in ((1, 1, 2, 4), (1, 2, 1), (1, 8)))
    inputs = (x.to(device).contiguous() for x in (partial, sums, written))
    merge_parts_cuda(*inputs, None, None, (2, 0), out, lse, scores)
    assert out[0, 0].tolist() == [[0.0] * 4, [pytest.approx(1.0)] * 4]
    assert lse[0, 0].tolist() == [INF]
    wanted = logits[0, 1, 0].softmax(-1) / 2
    assert scores[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-7)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_by_both_launches_equals_the_reference(dtype, device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 32, generator=generator).to(device, dtype) for n, h in ((1, 4), (70, 2), (70, 2)))
    options = {"cache_seqlens": torch.tensor([70, 33], device=device), "num_splits": 3, "window_size": (20, 0)}
    results = {}
    for backend in ("reference", "cuda"):
        with use_backend(backend):
            results[backend] = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, return_scores=True, **options)
    for got, want in zip(results["cuda"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("B,S,layers", [(1, 3, 1), (3, 70, 4), (2, 300, 2)])
def test_slots_move_in_all_layers(B, S, layers, seed, device):
    generator = torch.Generator().manual_seed(S)
    keep = (torch.rand(B, S, generator=generator) < 0.6).to(device)
    tensors = [torch.randn(B, 2, S, 24, generator=generator).half().to(device).transpose(1, 2) for _ in range(layers)]
    tensors += [torch.randn(B, S, 3, 5, generator=generator).to(device), torch.arange(S, device=device).repeat(B, 1)]
    tensors += [
        (torch.rand(B, S, 17, generator=generator) < 0.5).to(device),
        torch.randn(B, S, 40, device=device)[..., ::2],
    ]
    expected = [tensor.clone() for tensor in tensors]
    source, target = plan_moves(keep)
    reference.move_slots_(source, target, expected)
    with use_backend("cuda"), emulated(Emulated(seed=seed)):
        move_slots_(tensors, source, target)
    for number, (got, want) in enumerate(zip(tensors, expected, strict=True)):
        assert torch.equal(got, want), f"tensor {number}"


@pytest.mark.parametrize("changes", [{"B": -1}, {"word": 3}, {"word": 16}, {"access": 32}, {"entries": -1}], ids=str)
def test_moves_out_of_range_are_refused(changes):
    call = cuda.Moves(B=1, M=1, entries=1, rows=1, word=8, access=16)
    for name, value in changes.items():
        setattr(call, name, value)
    assert cuda.library().asymvlm_move_slots(call, None) == 1


@pytest.mark.parametrize("changes", [{"H": 0}, {"parts": 0}, {"scored": 2}, {"dtype": 7}, {"B": -1}], ids=str)
def test_merges_out_of_range_are_refused(changes):
    call = cuda.Merge(B=1, H=1, Q=1, S=1, D=8, parts=1, scored=1)
    for name, value in changes.items():
        setattr(call, name, value)
    assert cuda.library().asymvlm_merge(call, None) == 1
