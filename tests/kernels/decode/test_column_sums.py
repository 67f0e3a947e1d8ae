"""attention_column_sums gives what eager attention adds up over its queries, without the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asymvlm_kernels import attention_column_sums, use_backend
from asymvlm_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
any_backend = pytest.mark.parametrize("backend", ["reference", "triton"])

# B, Q, H, G, S, D
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "prompt": ((2, 40, 4, 2, 40, 16), torch.float16, {}),
    "slots": ((2, 21, 6, 2, 70, 64), torch.bfloat16, {"slots": True, "softcap": 4.0}),
    "window": ((1, 50, 3, 1, 50, 70), torch.bfloat16, {"window": 11, "softmax_scale": 0.3}),
    "float32": ((1, 21, 3, 1, 40, 16), torch.float32, {"slots": True}),
}


def make(sizes: tuple[int, ...], dtype: torch.dtype, slots: bool = False, **options: Any) -> dict[str, Any]:
    """Random inputs: the first queries of each sample but the first are padding, a few keys are NaN and unseen."""
    B, Q, H, G, S, D = sizes
    generator = torch.Generator().manual_seed(S)
    q = torch.randn(B, Q, H, D, generator=generator).to(dtype)
    k = torch.randn(B, G, S, D, generator=generator).to(dtype).transpose(1, 2)
    q_pos = (torch.arange(Q) + S - Q).repeat(B, 1)
    q_pos[1:, :3] = -1
    if slots:
        slot_pos = torch.stack([torch.randperm(S, generator=generator) for _ in range(B)]).int()
        slot_pos[:, 7:12] = -1
        k[:, 7:12] = float("nan")
        options["slot_pos"] = slot_pos
    return {"q": q, "k": k, "q_pos": q_pos} | options


def eager(call: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Column sums, and the logarithm of each query's sum, by the whole matrix in ``dtype``."""
    q, k, q_pos = call["q"], call["k"], call["q_pos"]
    B, (H, D), (S, G) = len(q), q.shape[2:], k.shape[1:3]
    place = call.get("slot_pos", torch.arange(S).expand(B, S))[:, None]
    seen = (place >= 0) & (place <= q_pos[..., None])
    if "window" in call:
        seen &= place >= q_pos[..., None] - call["window"]
    keys = k.to(dtype).masked_fill(~seen.any(1)[..., None, None], 0.0)
    logits = torch.einsum("bqhd,bshd->bhqs", q.to(dtype), keys.repeat_interleave(H // G, 2))
    logits = logits * call.get("softmax_scale", D**-0.5)
    if "softcap" in call:
        logits = call["softcap"] * torch.tanh(logits / call["softcap"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = logits.to(wide).masked_fill(~seen[:, None], float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0).to(dtype).to(wide)
    return weights.sum(2).unflatten(1, (G, H // G)).mean(2), logits.logsumexp(-1)


def moved(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


@any_backend
@pytest.mark.parametrize("name", CASES)
def test_sums_are_as_accurate_as_eager_attention(name, backend, device):
    sizes, dtype, options = CASES[name]
    call = make(sizes, dtype, **options)
    exact, lse = eager(call, torch.float64)
    same = eager(call, dtype)[0]
    given = moved(call, device)
    with use_backend(backend):
        sums = attention_column_sums(**given).cpu()
        behind = attention_column_sums(**given, lse=lse.float().to(device)).cpu()
    assert_as_accurate(sums, same, exact)
    assert_as_accurate(behind, same, exact)
    real = (call["q_pos"] >= 0).sum(-1, keepdim=True).expand(-1, sizes[3])
    assert torch.allclose(sums.sum(-1), real.float(), rtol=1e-5)  # each query hands out 1


@any_backend
def test_a_sample_alone_has_the_same_bits(backend, device):
    call = moved(make((2, 33, 4, 2, 40, 16), torch.bfloat16, slots=True), device)
    with use_backend(backend):
        sums = attention_column_sums(**call)
        for b in range(2):
            one = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in call.items()}
            assert torch.equal(attention_column_sums(**one)[0], sums[b])


@any_backend
def test_nobody_looks_and_nobody_is_looked_at(backend, device):
    call = moved(make((2, 5, 2, 1, 9, 16), torch.float32), device)
    call["q_pos"][0] = -1
    call["k"][0] = float("nan")
    call["q"][1, 0] = float("nan")
    call["q_pos"][1, 0] = -7
    with use_backend(backend):
        sums = attention_column_sums(**call)
        assert not sums[0].any()
        assert abs(sums[1].sum().item() - 2) < 1e-6  # of five queries the first three are none
        empty = attention_column_sums(**call | {"q": call["q"][:, :0], "q_pos": call["q_pos"][:, :0]})
        assert empty.shape == (2, 1, 9)
        assert not empty.any()


def test_a_block_of_queries_more_changes_rounding_alone(monkeypatch, device):
    from asymvlm_kernels.decode import reference

    call = moved(make((2, 40, 4, 2, 40, 16), torch.float32), device)
    with use_backend("reference"):
        whole = attention_column_sums(**call)
        monkeypatch.setattr(reference, "LOGITS", 7 * 4 * 40)
        assert torch.allclose(attention_column_sums(**call), whole, atol=1e-6)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"q_pos": torch.zeros(2, 4, dtype=torch.int64)}, r"q_pos must have shape \(2, 5\), got \(2, 4\)"),
        ({"slot_pos": torch.zeros(2, 9, dtype=torch.int64)}, "slot_pos must be int32, got int64"),
        ({"lse": torch.zeros(2, 5, 2)}, r"lse must have shape \(2, 2, 5\), got \(2, 5, 2\)"),
        ({"window": -2}, "window must be a whole number of -1 or more, got -2"),
        ({"softcap": -1.0}, "softcap must be a finite number of at least 0, got -1.0"),
        ({"k": torch.zeros(2, 9, 3, 16)}, "the heads of q must be a multiple of the 3 heads of k, got 2"),
    ],
)
def test_a_wrong_argument_is_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention_column_sums(**make((2, 5, 2, 1, 9, 16), torch.float32) | wrong)
