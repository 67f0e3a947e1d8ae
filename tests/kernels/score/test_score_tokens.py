"""score_tokens: accuracy, exact ties, independence of the batch, masks, special values, strides and far offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asymvlm_kernels import score_tokens, select_tokens
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.testing import (
    DTYPES,
    PrefillInputs,
    assert_as_accurate,
    exact_inputs,
    literal_scores,
    prefill_inputs,
)

NAN, INF = float("nan"), float("inf")
SIZES = [(1, 1, 1, 1), (2, 33, 3, 70), (1, 70, 130, 96), (1, 65, 65, 1176), (1, 64, 36, 3072)]

pytestmark = pytest.mark.usefixtures("triton_backend")
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@any_dtype
@pytest.mark.parametrize("B,N,L,D", SIZES)
def test_as_accurate_as_pytorch(B, N, L, D, dtype, device):
    inputs = prefill_inputs(B, N, L, D, dtype, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    for weight in (w, None):
        same_dtype, exact = (literal_scores(v, t, weight, to) for to in (dtype, torch.float64))
        assert_as_accurate(score_tokens(v, t, weight), same_dtype, exact)


@any_dtype
def test_error_at_a_real_width_is_below_one_hundred_thousandth(dtype, device):
    inputs = prefill_inputs(1, 96, 36, 3072, dtype, device=device)
    exact = literal_scores(inputs.vision, inputs.text, inputs.weight, torch.float64)
    error = (score_tokens(**vars(inputs)).double() - exact).abs().max().item()
    assert error < (1e-5 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e4])
def test_small_and_large_text_keeps_its_digits_in_fp16(scale, device):
    inputs = prefill_inputs(1, 40, 5, 256, torch.float16, device=device)
    weight = inputs.weight * scale  # t' is unit length times the weight: unscaled, its low part would underflow
    exact = literal_scores(inputs.vision, inputs.text, weight, torch.float64)
    error = (score_tokens(inputs.vision, inputs.text, weight).double() - exact).abs().max().item()
    assert error < 1e-6 * scale


@any_dtype
@pytest.mark.parametrize("B,N,L,D", [(2, 33, 3, 70), (1, 70, 130, 96), (1, 100, 36, 1024), (1, 40, 5, 3)])
def test_exact_inputs_score_bitwise_as_the_reference(B, N, L, D, dtype, device):
    inputs = exact_inputs(B, N, L, D, dtype, device=device)
    result = score_tokens(**vars(inputs))
    assert torch.equal(result, reference.score_tokens(**vars(inputs), vision_mask=None, text_mask=None))
    assert len(result.unique()) < max(result.numel() // 2, 20)  # ties abound, so the rule for ties is tested
    counts = torch.full((B,), N // 2, device=device)
    assert torch.equal(select_tokens(result, counts), reference.select_tokens(result, counts, None, N))


@any_dtype
def test_random_inputs_keep_the_same_tokens(dtype, device):
    N, K = 150, 97
    inputs = prefill_inputs(2, N, 20, 256, dtype, count=K, margin=1e-5, device=device)
    exact = literal_scores(inputs.vision, inputs.text, inputs.weight, torch.float64)
    best = exact.sort(descending=True, stable=True).indices[:, :K].sort(-1).values
    counts = torch.full((2,), K, device=device)
    assert torch.equal(select_tokens(score_tokens(**vars(inputs)), counts, capacity=K), best)


@any_dtype
@pytest.mark.parametrize("D", [72, 70, 192])  # 16-byte rows, odd rows, several steps
def test_a_row_scores_the_same_in_any_batch(D, dtype, device):
    inputs = prefill_inputs(2, 70, 40, D, dtype, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    together = score_tokens(v, t, w)
    assert torch.equal(score_tokens(v[1:2], t[1:2], w)[0], together[1])  # alone
    assert torch.equal(score_tokens(v[1:2, 7:8].contiguous(), t[1:2], w)[0, 0], together[1, 7])  # one token
    assert torch.equal(score_tokens(v[:, 33:], t, w), together[:, 33:])  # at another place of another tile
    longer = torch.cat([t, torch.zeros_like(t)], 1)  # padded text, as in a batch with a longer question
    real = torch.arange(80, device=device).expand(2, 80) < 40
    assert torch.equal(score_tokens(v, longer, w, text_mask=real), together)


@any_dtype
def test_masks_equal_a_shorter_batch(dtype, device):
    inputs = prefill_inputs(1, 90, 150, 96, dtype, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    torch.manual_seed(0)
    vision_mask = torch.rand(1, 90, device=device) < 0.5
    text_mask = torch.rand(1, 150, device=device) < 0.5
    text_mask[:, 64:128] = False  # a whole block of text without a real row
    vision_mask[:, 32:64] = False  # a whole tile of vision without one
    result = score_tokens(v, t, w, vision_mask=vision_mask, text_mask=text_mask)
    assert torch.equal(result[vision_mask], score_tokens(v[:, vision_mask[0]], t[:, text_mask[0]], w)[0])
    assert bool((result[~vision_mask] == -INF).all())


def test_masked_rows_are_never_read_into_a_score(device):
    inputs = prefill_inputs(2, 70, 20, 64, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    vision_mask = torch.arange(70, device=device).expand(2, 70) >= 5
    text_mask = torch.arange(20, device=device).expand(2, 20) < 13
    clean = score_tokens(v, t, w, vision_mask=vision_mask, text_mask=text_mask)
    v[~vision_mask], t[~text_mask] = NAN, INF
    assert torch.equal(score_tokens(v, t, w, vision_mask=vision_mask, text_mask=text_mask), clean)
    assert bool(clean[vision_mask].isfinite().all())


@any_dtype
def test_masked_text_does_not_score_zero(dtype, device):
    # every true score is negative, so a masked column that counted as 0 would win
    vision = torch.rand(1, 40, 16, device=device).to(dtype) + 1
    text = -torch.rand(1, 70, 16, device=device).to(dtype) - 1
    mask = torch.arange(70, device=device)[None] % 3 == 1
    assert bool((score_tokens(vision, text, text_mask=mask) < -0.5).all())
    assert bool((score_tokens(vision, text) < -0.5).all())  # nor do the columns that fill up the last block


@pytest.mark.parametrize("L", [0, 3, 70])
def test_no_text_scores_minus_infinity(L, device):
    inputs = prefill_inputs(2, 40, L, 16, device=device)
    mask = torch.zeros(2, L, dtype=torch.bool, device=device)
    if L:
        mask[1, -1] = True
    scores = score_tokens(**vars(inputs), text_mask=mask)
    assert bool((scores[0] == -INF).all())
    assert bool(scores[1].isfinite().all()) == (L > 0)
    if L == 0:
        assert bool((score_tokens(**vars(inputs)) == -INF).all())


@pytest.mark.parametrize("B,N,D", [(0, 3, 4), (2, 0, 4)])
def test_empty_axes(B, N, D, device):
    assert score_tokens(torch.empty(B, N, D, device=device), torch.empty(B, 2, D, device=device)).shape == (B, N)


@any_dtype
def test_special_values_score_as_the_reference(dtype, device):
    inputs = exact_inputs(1, 40, 6, 64, dtype, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    v[0, 1], v[0, 2, 3], v[0, 3, 5], v[0, 4, 5] = 0, NAN, INF, -INF
    no_mask = {"vision_mask": None, "text_mask": None}

    def check():
        result, expected = score_tokens(v, t, w), reference.score_tokens(v, t, w, **no_mask)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
        return result[0].tolist()

    scores = check()
    assert scores[1] == 0.0  # a zero row
    assert scores[2] != scores[2]  # a NaN goes in, a NaN comes out
    t[0, 2] = 0  # a zero text row scores 0 against every row
    check()
    w[7] = INF
    check()
    t[0, 4, 1] = NAN  # one NaN in the text: the maximum is unknown for every row
    assert all(score != score for score in check())


@any_dtype
@pytest.mark.parametrize("D", [64, 70])
def test_any_stride(D, dtype, device):
    inputs = prefill_inputs(2, 50, 9, D, dtype, device=device)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    vision_mask = torch.rand(2, 50, device=device) < 0.8
    text_mask = torch.rand(2, 9, device=device) < 0.8
    expected = score_tokens(v, t, w, vision_mask=vision_mask, text_mask=text_mask)

    def strided(tensor):  # every axis strided, the base not aligned
        wide = torch.full([2 * size + 1 for size in tensor.shape], NAN).to(tensor.device, tensor.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)

    def columns_outside(tensor):
        return tensor.mT.contiguous().mT

    for view in (strided, columns_outside):
        masks = {"vision_mask": view(vision_mask), "text_mask": view(text_mask)}
        result = score_tokens(view(v), view(t), strided(w), **masks)
        assert torch.allclose(result, expected, rtol=0, atol=1e-6)
        assert torch.equal(result == -INF, expected == -INF)
    shared = score_tokens(v[:1].expand(2, 50, D), t[:1].expand(2, 9, D), w)  # batch of stride 0
    assert torch.equal(shared[0], shared[1])


def test_offsets_past_two_to_the_31(device):
    # 4 GiB of address space; on a CPU only the pages that are touched become memory
    far, D = 2**31 + 4096, 64
    if device.type == "cuda":
        storage = torch.zeros(far + 4096, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.empty(far + 4096, dtype=np.float16))
    storage[:D] = 1
    storage[far : far + D] = -1
    one = torch.ones(2, 1, D, dtype=torch.float16, device=device)
    assert score_tokens(storage.as_strided((2, 1, D), (far, D, 1)), one).tolist() == [[1.0], [-1.0]]
    assert score_tokens(storage.as_strided((1, 2, D), (D, far, 1)), one[:1]).tolist() == [[1.0, -1.0]]
    assert score_tokens(storage.as_strided((1, 1, 2), (2, 2, far)), one[:1, :, :2]).tolist() == [[0.0]]
    assert score_tokens(one, storage.as_strided((2, 1, D), (far, D, 1))).tolist() == [[1.0], [-1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 2, 5, 17, 600])
def test_the_reference_scores_a_row_alike_among_any_number_of_rows(N, dtype):
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(2, 700, 96, generator=generator).to(dtype)
    text = torch.randn(2, 30, 96, generator=generator).to(dtype)
    among_many = reference.score_tokens(vision, text, None, None, None)
    some = reference.score_tokens(vision[1:, 3 : 3 + N], text[1:], None, None, None)
    assert torch.equal(some, among_many[1:, 3 : 3 + N])


@any_dtype
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(2, 4), N=st.integers(1, 700), L=st.integers(1, 90), D=st.sampled_from([1, 3, 17, 70, 96, 255, 256]),
    share=st.sampled_from([0.1, 0.6, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_sample_of_the_reference_scores_the_same_in_any_batch(B, N, L, D, share, seed, dtype):
    """With masked places at the ends of its vision and anywhere in its text, or without them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = prefill_inputs(B, N, L, D, dtype, seed=seed)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    first, last = (torch.randint(N, (2, B, 1), generator=generator)).sort(0).values
    place = torch.arange(N).expand(B, N)
    vision_mask = (place >= first) & (place <= last)
    text_mask = torch.rand(B, L, generator=generator) < share
    scores, best, _ = reference.score_tokens_best(v, t, w, vision_mask, text_mask)
    assert torch.equal(scores, reference.score_tokens(v, t, w, vision_mask, text_mask))
    for b in range(B):
        seen, real = vision_mask[b], text_mask[b].nonzero()[:, 0]
        alone, its_best, _ = reference.score_tokens_best(v[b : b + 1, seen], t[b : b + 1, real], w, None, None)
        assert torch.equal(alone[0], scores[b, seen])
        its_best = its_best[0].long()
        assert torch.equal(its_best if len(real) == 0 else real[its_best], best[b, seen].long())
        assert bool((scores[b, ~seen] == -INF).all())


@any_dtype
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 700), start=st.integers(0, 699), L=st.integers(1, 90),
    D=st.sampled_from([1, 3, 17, 70, 96, 255, 1024]),
)  # fmt: skip
def test_a_row_of_the_reference_scores_the_same_among_any_rows(N, start, L, D, dtype):
    """Holds if the library of this CPU sums the rows of a product in one order: not by construction."""
    inputs = prefill_inputs(1, 700, L, D, dtype)
    v, t, w = inputs.vision, inputs.text, inputs.weight
    among_many = reference.score_tokens(v, t, w, None, None)
    some = slice(start, start + N)
    assert torch.equal(reference.score_tokens(v[:, some], t, w, None, None), among_many[:, some])


@pytest.mark.parametrize("power", [-100, -83, -60, 60, 80, 115])  # 8e-31 to 4e34
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_scores_the_cosine_of_rows_of_any_length(power, dtype):
    inputs = prefill_inputs(2, 40, 20, 64, dtype)
    vision, text = inputs.vision.clone(), inputs.text.clone()
    vision[:, ::3] *= 2.0**power
    vision[:, 1::5] *= 2.0 ** (-power / 2 // 1)
    vision[0, 4] = 0
    text[:, ::2] *= 2.0**power
    mixed = PrefillInputs(vision, text, inputs.weight)
    plain = PrefillInputs(inputs.vision.clone(), inputs.text, inputs.weight)
    plain.vision[0, 4] = 0
    scores, expected = (reference.score_tokens(*vars(x).values(), None, None) for x in (mixed, plain))
    assert torch.equal(scores, expected)  # a power of two changes no digit
    assert scores[0, 4] == 0
    grads = []
    for x in (mixed, plain):
        best = reference.score_tokens_best(*vars(x).values(), None, None)
        assert torch.equal(best[0], expected)
        grads.append(reference.score_tokens_grad(torch.ones(2, 40), x.vision, x.text, *best[1:]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_a_row_that_holds_an_infinity_scores_as_before():
    inputs = prefill_inputs(1, 20, 3, 16)
    inputs.vision[0, 2, 5], inputs.vision[0, 7, 1] = INF, NAN
    scores = reference.score_tokens(*vars(inputs).values(), None, None)[0]
    assert scores.isnan().nonzero()[:, 0].tolist() == [2, 7]
