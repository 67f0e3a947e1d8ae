"""score_from_lse gives the scores of attend_slots, behind any attention that returns its logsumexp."""

from __future__ import annotations

import pytest
import torch
from attention import Call, attend, make_call

from asymvlm_kernels import score_from_lse, use_backend
from asymvlm_kernels.testing import DTYPES, assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
any_backend = pytest.mark.parametrize("backend", ["reference", "triton"])

# B, Q, H, G, S, D
CASES = {
    "slots": ((2, 1, 4, 2, 90, 128), {"slots": True, "window_size": (50, -1)}),
    "ragged": ((2, 1, 4, 4, 70, 96), {"leftpad": [0, 20], "lengths": [33, 70], "softcap": 4.0}),
    "rows": ((1, 7, 8, 2, 50, 64), {"causal": True}),
    "odd": ((1, 9, 3, 1, 40, 70), {"window_size": (5, 2), "softmax_scale": 0.3}),
}


@any_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_as_accurate_as_eager_attention(name, dtype, backend, device):
    sizes, options = CASES[name]
    call = make_call(*sizes, dtype, device, **options)
    rows = min(call.q.shape[1], 6)
    cpu = Call(*(x.cpu() for x in (call.q, call.k, call.v)), call.options)
    exact, same = attend(cpu, torch.float64, rows), attend(cpu, dtype, rows)
    lse = exact[1].float().to(device)
    with use_backend(backend):
        scores = score_from_lse(call.q, call.k, lse, **call.options, score_rows=rows)
        last = dict(call.options)
        if "q_pos" in last:
            last["q_pos"] = last["q_pos"][:, -rows:]
        alone = score_from_lse(call.q[:, -rows:], call.k, lse[..., -rows:], **last, score_rows=rows)
    assert_as_accurate(scores.cpu(), same[2], exact[2])
    assert torch.equal(alone, scores)  # the last rows are enough


@any_backend
@pytest.mark.parametrize("empty", [float("inf"), float("-inf")])
def test_an_empty_row_scores_zero_whatever_its_logsumexp(empty, backend, device):
    call = make_call(2, 1, 4, 2, 40, 16, torch.float32, device, lengths=[0, 40])
    lse = call.run(return_softmax_lse=True)[1]
    lse[0] = empty
    call.k[0] = float("nan")
    with use_backend(backend):
        scores = score_from_lse(call.q, call.k, lse, **call.options)
    assert not scores[0].any()
    assert abs(scores[1].sum().item() - 1) < 1e-6


def test_strided_logsumexp_and_a_sample_alone_give_the_same_bits(device):
    call = make_call(3, 1, 4, 2, 70, 64, torch.bfloat16, device, slots=True)
    lse = call.run(return_softmax_lse=True)[1]
    with use_backend("triton"):
        scores = score_from_lse(call.q, call.k, lse, **call.options)
        strided = lse.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert torch.equal(score_from_lse(call.q, call.k, strided, **call.options), scores)
        one = call.sample(1)
        assert torch.equal(score_from_lse(one.q, one.k, lse[1:2], **one.options)[0], scores[1])
