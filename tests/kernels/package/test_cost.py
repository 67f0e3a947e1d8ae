"""No host synchronisation in an op, and no copy of V in fp32."""

from __future__ import annotations

import pytest
import torch
from watch import Watch

import asymvlm_kernels as ak
from asymvlm_kernels.prefill import gather, reference, score, select

OPS = {score: ["score_tokens"], select: ["importance_gap", "select_tokens"], gather: ["gather_rows"]}


def inputs(device, N: int = 40, D: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    vision, text = torch.randn(2, N, D, device=device), torch.randn(2, 3, D, device=device)
    return vision, text, torch.ones(D, device=device), torch.rand(2, N, device=device) < 0.8


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch) -> str:
    """The public functions call the implementation itself: a dispatch mode does not see inside a registered op."""
    for module, names in OPS.items():
        for name in names:
            triton = getattr(module, f"_{name}_triton")
            implementation = triton if request.param == "triton" else getattr(reference, name)
            monkeypatch.setattr(module, f"_{name}", implementation)
    return request.param


def test_no_op_waits_for_the_device(backend, device):
    vision, text, weight, mask = inputs(device)
    counts = torch.tensor([5, 9], device=device)
    groups = torch.zeros(2, 40, dtype=torch.int64, device=device)
    with Watch() as watch:
        scores = ak.score_tokens(vision, text, weight, vision_mask=mask, text_mask=mask[:, :3])
        gap = ak.importance_gap(scores, mask)
        for budget in (
            ak.UniformBudget(0.5),
            ak.LinearBudget(0.5, 1.0, 0.1),
            ak.ThresholdBudget(0.1, 0.3, 0.9, 0.5, 0.2),
        ):
            ak.keep_counts(gap, mask.sum(-1), budget)
        index = ak.select_tokens(scores, counts, mask=mask, capacity=9)
        ak.gather_rows(vision, index, pad=1.5)
        ak.prune_sequence(vision, mask, ~mask, weight, groups=groups, per_image=True, static=True)
    # on a CPU, where there is nothing to wait for, the reference looks at masks to skip work
    on_cpu = backend == "reference" and device.type == "cpu"
    allowed = {"nonzero", "_local_scalar_dense"} if on_cpu else set()
    assert set(watch.waits) <= allowed


@pytest.mark.parametrize("several_images,reads", [(False, 1), (True, 2)])
def test_a_trimmed_length_is_read_once(several_images, reads, device, monkeypatch):
    vision, _, _, mask = inputs(device)
    groups = torch.zeros(2, 40, dtype=torch.int64, device=device) if several_images else None
    seen, plain = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: seen.append(tensor.shape) or plain(tensor))
    with Watch() as watch:
        ak.prune_sequence(vision, mask, ~mask, groups=groups)
    assert len(seen) + len(watch.waits) == reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_vision_is_made(dtype, backend, device):
    # the reference works in chunks of rows; the kernel needs t' only
    N, D = (8192, 64) if backend == "reference" else (1024, 64)
    vision, text, weight, _ = inputs(device, N, D)
    vision, text = vision.to(dtype), text.to(dtype)
    with Watch() as watch:
        ak.score_tokens(vision, text, weight)
    assert 0 < watch.largest <= vision.nbytes // 4
