"""Attention with scores: accuracy, who is seen, independence of the batch, empty rows, special values, far offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention import Call, attend, make_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asymvlm_kernels import flash_attn_func, flash_attn_with_kvcache, score_from_lse, use_backend
from asymvlm_kernels.decode import base, reference
from asymvlm_kernels.testing import DTYPES, assert_as_accurate
from asymvlm_kernels.tuning import decode as tuning

NAN, INF = float("nan"), float("inf")
BACKENDS = ("reference", "triton")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # numpy's, of -inf
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
any_backend = pytest.mark.parametrize("backend", BACKENDS)

# B, Q, H, G, S, D and options: every head width, group size and kind of mask at least once
CASES = {
    "one slot": ((1, 1, 1, 1, 1, 8), {}),
    "gemma 3": ((2, 1, 4, 2, 150, 256), {"slots": True, "softmax_scale": 0.08}),
    "gemma 3, sliding": ((2, 1, 4, 2, 150, 256), {"slots": True, "window_size": (40, -1)}),
    "gemma 2": ((2, 1, 4, 2, 140, 256), {"softcap": 2.0, "lengths": [140, 33], "window_size": (70, 0)}),
    "phi-3.5": ((2, 1, 4, 4, 200, 96), {"leftpad": [0, 130], "lengths": [197, 200]}),
    "qwen2.5": ((1, 1, 14, 2, 300, 128), {"num_splits": 3}),
    "small": ((2, 1, 6, 2, 130, 64), {"lengths": [129, 1], "softcap": 30.0}),
    "odd": ((2, 3, 3, 1, 70, 70), {"slots": True}),
    "several rows": ((2, 5, 8, 2, 90, 64), {"causal": True, "lengths": [90, 50]}),
    "rows in two tiles": ((1, 9, 4, 1, 70, 64), {"causal": True, "window_size": (8, 3)}),
    "more rows than slots": ((1, 5, 2, 1, 3, 16), {"causal": True}),
}


@any_backend
@any_dtype
@pytest.mark.parametrize("name", CASES)
def test_output_logsumexp_and_scores_are_as_accurate_as_eager_attention(name, dtype, backend, device):
    sizes, options = CASES[name]
    call = make_call(*sizes, dtype, device, **options)
    rows = min(call.q.shape[1], 3)
    with use_backend(backend):
        out, lse, scores = call.run(return_softmax_lse=True, return_scores=True, score_rows=rows)
    cpu = Call(*(x.cpu() for x in (call.q, call.k, call.v)), call.options)
    exact, same = attend(cpu, torch.float64, rows), attend(cpu, dtype, rows)
    assert_as_accurate(out.cpu(), same[0], exact[0])
    assert_as_accurate(scores.cpu(), same[2], exact[2])
    empty = exact[1].isinf()
    assert torch.equal(lse.cpu().isinf(), empty)
    assert_as_accurate(lse.cpu()[~empty], same[1][~empty], exact[1][~empty])
    seen = torch.zeros_like(scores, dtype=torch.bool, device="cpu")
    for b in range(len(seen)):
        for i in range(call.q.shape[1] - rows, call.q.shape[1]):
            seen[b, call.visible(b, i)] = True
    assert bool((scores.cpu()[~seen] == 0).all())
    if name != "more rows than slots":
        assert (scores.double().sum(-1) - 1).abs().max().item() < 2e-6


@pytest.mark.parametrize("name", ["gemma 3, sliding", "qwen2.5", "odd"])
def test_output_has_the_same_bits_with_and_without_scores(name, device):
    sizes, options = CASES[name]
    call = make_call(*sizes, torch.bfloat16, device, **options)
    with use_backend("triton"):
        out, lse, scores = call.run(return_softmax_lse=True, return_scores=True)
        assert torch.equal(call.run(), out)
        again = call.run(return_softmax_lse=True, return_scores=True)
    for one, other in zip(again, (out, lse, scores), strict=True):  # and in every run
        assert torch.equal(one, other)


@any_backend
@any_dtype
@pytest.mark.parametrize("options", [{"lengths": [150, 40, 97]}, {"slots": True}, {"leftpad": [3, 0, 77]}])
def test_a_sample_has_the_same_bits_in_any_batch(options, dtype, backend, monkeypatch, device):
    monkeypatch.setattr(tuning, "PROGRAMS", 4)  # two parts; a batch that counted would change them
    monkeypatch.setattr(tuning, "MINIMUM_BYTES", 1)
    call = make_call(3, 1, 4, 2, 150, 64, dtype, device, **options)
    with use_backend(backend):
        together = call.run(return_softmax_lse=True, return_scores=True)
        for b in range(3):
            alone = call.sample(b).run(return_softmax_lse=True, return_scores=True)
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one[0], many[b])


@given(call=st.deferred(lambda: calls()))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_sample_of_the_reference_has_the_same_bits_in_any_batch(call):
    rows = call.q.shape[1]
    with use_backend("reference"):
        together = call.run(return_softmax_lse=True, return_scores=True, score_rows=rows)
        for b in range(len(call.q)):
            alone = call.sample(b).run(return_softmax_lse=True, return_scores=True, score_rows=rows)
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one[0], many[b])


def test_layout_does_not_change_a_bit(device):
    call = make_call(2, 2, 4, 2, 70, 64, torch.bfloat16, device)
    dense = Call(*(x.contiguous() for x in (call.q, call.k, call.v)))  # FlashAttention's own layout
    wide = Call(*(torch.cat([x, x.new_full(x.shape, NAN)], -1)[..., :64] for x in (call.q, call.k, call.v)))
    inside = Call(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (call.q, call.k, call.v)))
    odd = Call(*(torch.cat([x.new_zeros(*x.shape[:-1], 1), x], -1)[..., 1:] for x in (call.q, call.k, call.v)))
    with use_backend("triton"):
        expected = call.run(return_scores=True)
        for other in (dense, wide, inside):
            for got, want in zip(other.run(return_scores=True), expected, strict=True):
                assert torch.equal(got, want)
        for got, want in zip(odd.run(return_scores=True), expected, strict=True):  # unaligned: another tile
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@any_backend
def test_what_nobody_sees_has_no_influence(backend, device):
    call = make_call(2, 1, 4, 2, 90, 64, torch.float32, device, lengths=[80, 90], leftpad=[5, 0], slots=True)
    with use_backend(backend):
        clean = call.run(return_scores=True)
        for b in range(2):
            hidden = [slot for slot in range(90) if slot not in call.visible(b, 0)]
            call.k[b, hidden], call.v[b, hidden] = NAN, INF
        assert len(hidden) > 10
        for got, want in zip(call.run(return_scores=True), clean, strict=True):
            assert torch.equal(got, want)


@any_backend
def test_a_row_that_sees_nothing_gives_zero_and_never_nan(backend, device):
    call = make_call(3, 2, 4, 2, 70, 64, torch.float16, device, slots=True)
    call.options["slot_pos"][0] = -1  # everything is free
    call.options["q_pos"][1] = -1  # nothing is that early
    call.k[:2], call.v[:2] = NAN, NAN
    with use_backend(backend):
        out, lse, scores = call.run(return_softmax_lse=True, return_scores=True, score_rows=2)
        lengths = torch.tensor([0, 70, 70], device=device)
        call.options = {"cache_seqlens": lengths, "cache_leftpad": torch.tensor([0, 70, 0], device=device)}
        again = call.run(return_softmax_lse=True, return_scores=True)
    for result in ((out, lse, scores), again):
        assert not result[0][:2].any()
        assert bool((result[1][:2] == INF).all())  # FlashAttention's
        assert not result[2][:2].any()
        assert bool(result[0][2].isfinite().all())
        torch.testing.assert_close(result[2][2].sum(), torch.ones((), device=device))


@any_backend
def test_a_nan_that_is_seen_is_not_hidden(backend, device):
    call = make_call(2, 1, 4, 2, 70, 64, torch.float32, device, lengths=[60, 70])
    call.k[0, 3, 0, 5] = NAN
    with use_backend(backend):
        out, scores = call.run(return_scores=True)
    assert bool(out[0, :, :2].isnan().all())  # the heads that share the key head
    assert bool(out[0, :, 2:].isfinite().all())
    assert bool(out[1].isfinite().all())
    assert bool(scores[0, :60].isnan().all())
    assert not scores[0, 60:].any()


def test_slots_in_any_order_equal_a_cache_in_order(device):
    call = make_call(1, 1, 4, 2, 120, 64, torch.float32, device, slots=True, window_size=(60, 0))
    place = call.options["slot_pos"][0].long()
    order = [slot for slot in place.argsort().tolist() if place[slot] >= 0 and place[slot] >= 119 - 60]
    dense = Call(call.q, call.k[:, order], call.v[:, order])
    with use_backend("triton"):
        out, scores = call.run(return_scores=True)
        expected, in_order = dense.run(return_scores=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(scores[:, order], in_order)


def test_one_position_for_several_rows_counts_down_to_the_first(device):
    call = make_call(2, 3, 4, 2, 40, 16, torch.float32, device, slots=True)
    expected = call.run(return_scores=True, score_rows=3)
    call.options["q_pos"] = call.options["q_pos"][:, -1]
    for got, want in zip(call.run(return_scores=True, score_rows=3), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("num_splits", [1, 2, 7, 1000])
def test_any_number_of_splits_gives_the_same_answer(num_splits, device):
    call = make_call(1, 1, 4, 2, 200, 64, torch.float32, device)
    with use_backend("triton"):
        for got, want in zip(call.run(num_splits=num_splits, return_scores=True), call.run(return_scores=True)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@st.composite
def calls(draw):
    Q, R, G, S = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 50))
    D, B = draw(st.sampled_from([1, 3, 8, 32, 48])), draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    leftpad = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    slots = draw(st.booleans())
    window = (draw(st.integers(-1, 60)), draw(st.integers(-1, 0 if slots else 9)))
    options = {
        "slots": slots,
        "lengths": draw(st.sampled_from([None, lengths])),
        "leftpad": draw(st.sampled_from([None, leftpad])),
        "window_size": window,
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "num_splits": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 99)),
    }
    return make_call(B, Q, R * G, G, S, D, torch.float32, "cpu", **options)


def check_definition(call: Call, backend: str, device: torch.device) -> None:
    rows = call.q.shape[1]
    moved = Call(*(x.to(device) for x in (call.q, call.k, call.v)))
    moved.options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.options.items()}
    with use_backend(backend):
        got = moved.run(return_softmax_lse=True, return_scores=True, score_rows=rows)
    for result, want in zip(got, attend(call, torch.float64, rows), strict=True):
        torch.testing.assert_close(result.cpu().double(), want, rtol=2e-5, atol=2e-6)


any_example = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(call=calls())
@settings(any_example, max_examples=60)
def test_any_call_of_the_reference_equals_the_definition(call, device):
    check_definition(call, "reference", device)


@given(call=calls())
@settings(any_example, max_examples=12)  # the interpreter is slow
def test_any_call_of_the_kernel_equals_the_definition(call, device):
    check_definition(call, "triton", device)


def test_reference_in_blocks_of_rows_gives_the_same_bits(monkeypatch):
    call = make_call(2, 9, 4, 2, 30, 16, torch.float32, "cpu", causal=True)
    whole = call.run(return_softmax_lse=True, return_scores=True, score_rows=6)
    monkeypatch.setattr(reference, "LOGITS", 4 * 30 * 4)  # 4 rows
    for got, want in zip(call.run(return_softmax_lse=True, return_scores=True, score_rows=6), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window_size": (9, -1)}, {"softcap": 3.0}])
def test_a_long_query_is_delegated_without_a_change(options, device):
    call = make_call(2, 70, 4, 2, 70, 32, torch.float32, device)
    got = flash_attn_func(call.q, call.k, call.v, **options, return_scores=True, score_rows=4)
    with use_backend("reference"):
        want = flash_attn_func(call.q, call.k, call.v, **options, return_scores=True, score_rows=4)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(flash_attn_func(call.q, call.k, call.v, **options), got[0])


def test_an_installed_flash_attn_serves_long_queries(monkeypatch, device):
    seen = []

    def flash(q, k, v, dropout_p, scale, causal, window_size, softcap, *, return_attn_probs):
        seen.append((dropout_p, causal, window_size, softcap, return_attn_probs))
        with use_backend("reference"):
            return flash_attn_func(q, k, v, dropout_p, scale, causal, window_size, softcap, return_attn_probs=True)

    monkeypatch.setattr(base, "flash_attn_for", lambda q: flash)
    call = make_call(1, 64, 4, 2, 80, 32, torch.float32, device)
    options = {"causal": True, "window_size": (30, -1), "softcap": 5.0, "return_attn_probs": True}
    got = flash_attn_func(call.q, call.k, call.v, **options, return_scores=True, score_rows=2)
    with use_backend("reference"):
        want = flash_attn_func(call.q, call.k, call.v, **options, return_scores=True, score_rows=2)
    assert seen == [(0.0, True, (30, 0), 5.0, True)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    flash_attn_func(call.q[:, :9], call.k, call.v)
    flash_attn_with_kvcache(call.q, call.k, call.v, cache_seqlens=70)
    assert len(seen) == 1  # short ones, and ragged ones, are ours


@any_backend
@pytest.mark.parametrize("B,Q,S", [(0, 1, 5), (2, 0, 5), (2, 1, 0)])
def test_empty_axes(B, Q, S, backend, device):
    call = make_call(B, Q, 4, 2, S, 16, torch.float32, device)
    with use_backend(backend):
        out, lse = call.run(return_softmax_lse=True)
        assert out.shape == (B, Q, 4, 16)
        assert lse.shape == (B, 4, Q)
        assert not out.any()
        if Q:
            assert call.run(return_scores=True)[1].shape == (B, S)


def test_offsets_past_two_to_the_31(device):
    # 4 GiB of address space; on a CPU only the pages that are touched become memory
    far = 2**31 + 4096
    if device.type == "cuda":
        storage = torch.zeros(far + 4096, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.empty(far + 4096, dtype=np.float16))
    q = torch.ones(1, 1, 2, 16, dtype=torch.float16, device=device)
    storage[: 4 * 16], storage[far : far + 4 * 16] = 1, 2
    apart = {"slots": (64, far, 16, 1), "heads": (64, 16, far, 1), "samples": (far, 32, 16, 1)}
    sizes = {"slots": (1, 2, 2, 16), "heads": (1, 2, 2, 16), "samples": (2, 2, 2, 16)}
    with use_backend("triton"):
        for name, strides in apart.items():
            cache = storage.as_strided(sizes[name], strides)
            small = Call(q.expand(len(cache), 1, 2, 16), cache.clone(), cache.clone())
            got = Call(small.q, cache, cache).run(return_scores=True)
            for one, other in zip(got, small.run(return_scores=True), strict=True):
                torch.testing.assert_close(one, other)


EDGES = {torch.int32: (-(2**31), -(2**30) - 1, 2**31 - 1), torch.int64: (-(2**63), -(2**31) - 5, 2**31 + 3, 2**63 - 1)}


@pytest.mark.parametrize("Q,dtype", [(1, torch.int32), (3, torch.int64)], ids=str)
def test_lengths_and_positions_at_the_edges_of_their_dtype(Q, dtype, device):
    values = [-9, -1, 0, 7, 40, 41, 2**30 + 5, *EDGES[dtype]]
    B, S = len(values), 40
    call = make_call(B, Q, 2, 1, S, 16, torch.float32, device)
    numbers = torch.tensor(values, dtype=dtype, device=device)
    slot_pos = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slot_pos[:, 30:] = torch.tensor([-(2**31), -1, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1, 5, 6, 7, 8], device=device)
    rows = numbers[:, None].expand(B, Q).clone()
    rows[:, 0] = 7  # beside a row at the edge
    calls = [
        {"cache_seqlens": numbers},
        {"cache_seqlens": numbers, "causal": True},
        {"cache_leftpad": numbers},
        {"slot_pos": slot_pos, "q_pos": numbers},
        {"slot_pos": slot_pos, "q_pos": rows},
    ]
    for options in calls:
        for window in ((-1, -1), (3, -1), (2**40, 0)):
            results = []
            for backend in BACKENDS:
                with use_backend(backend):
                    results.append(call.run(**options, window_size=window, return_scores=True, return_softmax_lse=True))
                    with_lse = {**options, "window_size": window}
                    results[-1] += (score_from_lse(call.q, call.k, results[-1][1], **with_lse),)
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"{options} {window}")
    with use_backend("reference"):  # a row at the farthest position sees every slot that holds a token
        _, scores = call.run(**calls[3], return_scores=True)
    assert ((scores[values.index(EDGES[dtype][-1])] > 0) == (slot_pos[0] >= 0)).all()
