"""The gradient of score_tokens for the weight: against float64 autograd, ties, masks, NaN, compilation, refusals."""

from __future__ import annotations

import pytest
import torch

from asymvlm_kernels import score_tokens, use_backend
from asymvlm_kernels.prefill import reference, score, score_grad
from asymvlm_kernels.testing import DTYPES, PrefillInputs, exact_inputs, prefill_inputs

NAN, INF = float("nan"), float("inf")
BACKENDS = ("reference", "triton")
any_backend = pytest.mark.parametrize("backend", BACKENDS)
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gradient(inputs: PrefillInputs, grad: torch.Tensor, backend: str, **masks: torch.Tensor) -> torch.Tensor:
    """d sum(grad * scores) / d weight, without the scores that no loss can use."""
    weight = inputs.weight.detach().clone().requires_grad_()
    with use_backend(backend):
        scores = score_tokens(inputs.vision, inputs.text, weight, **masks)
        scores.backward(grad)
    assert weight.grad is not None
    return weight.grad


def exact_gradient(inputs: PrefillInputs, grad: torch.Tensor, text_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 1 as written, in float64, by PyTorch's own autograd."""
    vision, text = (rows.double() for rows in (inputs.vision, inputs.text))
    weight = inputs.weight.double().requires_grad_()
    vision, text = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12) for rows in (vision, text))
    similarity = (vision * weight) @ text.mT
    if text_mask is not None:
        similarity = similarity.masked_fill(~text_mask[:, None], -INF)
    (similarity.max(-1).values * grad).sum().backward()
    assert weight.grad is not None
    return weight.grad


@any_backend
@any_dtype
@pytest.mark.parametrize("B,N,L,D", [(1, 1, 1, 1), (2, 150, 9, 70), (1, 40, 70, 520), (3, 17, 36, 1024)])
def test_equals_autograd_in_float64(B, N, L, D, dtype, backend, device):
    inputs = prefill_inputs(B, N, L, D, dtype, device=device)
    grad = torch.randn(B, N, generator=torch.Generator().manual_seed(0)).to(device)
    exact = exact_gradient(inputs, grad.double())
    error = (gradient(inputs, grad, backend).double() - exact).abs().max()
    assert error <= 2**-20 * max(exact.abs().max(), 1)


@any_backend
def test_masked_text_and_vision_send_nothing(backend, device):
    inputs = prefill_inputs(2, 70, 20, 48, device=device)
    vision_mask = torch.arange(70, device=device).expand(2, 70) % 7 > 1
    text_mask = torch.arange(20, device=device).expand(2, 20) % 3 == 1
    grad = torch.randn(2, 70, device=device)
    exact = exact_gradient(inputs, (grad * vision_mask).double(), text_mask)
    masks = {"vision_mask": vision_mask, "text_mask": text_mask}
    plain = gradient(inputs, grad, backend, **masks)
    assert torch.allclose(plain.double(), exact, rtol=0, atol=1e-5)
    inputs.vision[~vision_mask], inputs.text[~text_mask], grad[~vision_mask] = NAN, INF, NAN
    assert torch.equal(gradient(inputs, grad, backend, **masks), plain)


@any_backend
def test_equal_texts_send_the_gradient_to_the_lowest_index(backend, device):
    # 70 texts, two blocks of the kernel; columns 3 and 66 give the same product with different gradients
    vision = torch.tensor([[[1.0, 1.0, 1.0, 1.0]]], device=device)
    text = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device).neg().repeat(1, 70, 1)
    text[0, 3], text[0, 66] = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], device=device)
    inputs = PrefillInputs(vision, text, torch.ones(4, device=device))
    one = torch.ones(1, 1, device=device)
    assert gradient(inputs, one, backend).tolist() == [0, 0.5, 0, 0]
    first = torch.arange(70, device=device)[None] != 3
    assert gradient(inputs, one, backend, text_mask=first).tolist() == [0, 0, 0.5, 0]
    text[0, 5] = text[0, 66]  # in the block of the first
    assert gradient(inputs, one, backend, text_mask=first).tolist() == [0, 0, 0.5, 0]
    text[0, 5] = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    assert gradient(inputs, one, backend, text_mask=first).tolist() == [0, 0, 0, 0.5]


@any_dtype
def test_both_backends_save_the_same_text(dtype, device):
    inputs = exact_inputs(2, 90, 70, 64, dtype, device=device)  # ties abound
    inputs.vision[0, 3], inputs.text[1, 5, 2], inputs.text[1, 66] = 0, NAN, NAN
    masks = (torch.rand(2, 90, device=device) < 0.8, torch.rand(2, 70, device=device) < 0.8)
    masks[1][1, 5] = masks[1][1, 66] = True
    with use_backend("triton"):
        result = score._score_tokens_best(*vars(inputs).values(), *masks)
    expected = reference.score_tokens_best(*vars(inputs).values(), *masks)
    assert torch.equal(result[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert torch.equal(result[1], expected[1])
    assert (expected[1][1][masks[0][1]] == 5).all()  # the first NaN
    known = masks[0] & (expected[1] >= 0)
    assert torch.equal(result[2][known].nan_to_num(7.0), expected[2][known].nan_to_num(7.0))


@any_backend
def test_not_a_number_reaches_the_gradient_only_with_one(backend, device):
    inputs = prefill_inputs(1, 40, 6, 32, device=device)
    grad = torch.randn(1, 40, device=device)
    grad[0, 5] = 0
    clean = gradient(inputs, grad, backend)
    inputs.vision[0, 5, 2] = NAN
    assert torch.equal(gradient(inputs, grad, backend), clean)
    grad[0, 5] = 1
    assert gradient(inputs, grad, backend).isnan().all()


@any_backend
def test_nothing_to_score_against_sends_nothing(backend, device):
    inputs = prefill_inputs(2, 20, 3, 16, device=device)
    grad = torch.ones(2, 20, device=device)
    mask = torch.tensor([[False] * 3, [True] * 3], device=device)
    one = PrefillInputs(inputs.vision[1:], inputs.text[1:], inputs.weight)
    alone = gradient(one, grad[1:], backend)
    assert torch.allclose(gradient(inputs, grad, backend, text_mask=mask), alone, rtol=0, atol=1e-6)
    for B, N, L in ((2, 20, 0), (2, 0, 3), (0, 20, 3)):
        empty = PrefillInputs(inputs.vision[:B, :N], inputs.text[:B, :L], inputs.weight)
        assert not gradient(empty, grad[:B, :N], backend).any()


@any_backend
def test_any_stride_and_the_same_bits_again(backend, device):
    inputs = prefill_inputs(2, 50, 9, 24, device=device)
    grad = torch.randn(2, 50, device=device)
    wide = torch.full((2, 101, 49), NAN, device=device)[:, 1::2, 1::2].copy_(inputs.vision)
    strided = PrefillInputs(wide, inputs.text.mT.contiguous().mT, inputs.weight)
    results = [gradient(each, grad.T.contiguous().T, backend) for each in (inputs, strided, strided)]
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-5)
    assert torch.equal(results[1], results[2])
    expanded = gradient(inputs, torch.ones((), device=device).expand(2, 50), backend)
    assert torch.equal(expanded, gradient(inputs, torch.ones(2, 50, device=device), backend))


def test_gradcheck(device):
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(2, rows, 5, generator=generator).double().to(device) for rows in (7, 3))
    weight = (torch.rand(5, generator=generator).double() + 0.5).to(device).requires_grad_()
    mask = torch.rand(2, 7, generator=generator).to(device) < 0.8
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda w: score._score_tokens_best(vision, text, w, mask, mask[:, :3])[0].masked_fill(~mask, 0), weight
        )


@any_backend
def test_scores_do_not_change_with_a_gradient(backend, device, monkeypatch):
    inputs = prefill_inputs(2, 70, 70, 48, torch.bfloat16, device=device)
    weight = inputs.weight.clone().requires_grad_()
    with use_backend(backend):
        trained = score_tokens(inputs.vision, inputs.text, weight)
        monkeypatch.setattr(score, "_score_tokens_best", None)  # without a gradient to compute, the plain op runs
        with torch.no_grad():
            plain = score_tokens(inputs.vision, inputs.text, weight)
        assert torch.equal(score_tokens(inputs.vision, inputs.text, inputs.weight), plain)
    assert torch.equal(trained.detach(), plain)
    assert trained.requires_grad
    assert not plain.requires_grad


@any_backend
def test_registered_and_compiled(backend, monkeypatch, device):
    monkeypatch.undo()  # opcheck compares the storage of a result with that of its fake
    inputs = prefill_inputs(2, 20, 3, 16, device=device)
    weight = inputs.weight.clone().requires_grad_()
    mask = torch.arange(20, device=device).expand(2, 20) > 3

    def loss(weight: torch.Tensor) -> torch.Tensor:
        scores = score_tokens(inputs.vision, inputs.text, weight, vision_mask=mask)
        return torch.sigmoid(scores.masked_fill(~mask, 0) * 3).square().sum()

    torch.compiler.reset()
    with use_backend(backend):
        outs = score._score_tokens_best(inputs.vision, inputs.text, weight, mask, None)
        torch.library.opcheck(score._score_tokens_best, (inputs.vision, inputs.text, weight, mask, None))
        saved = (inputs.vision, inputs.text, *outs[1:])
        torch.library.opcheck(score_grad.score_tokens_grad, (mask.float(), *(x.detach() for x in saved)))
        (expected,) = torch.autograd.grad(loss(weight), weight)
        (result,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    assert torch.equal(result, expected)


@any_backend
def test_other_gradients_are_refused(backend, device):
    inputs = prefill_inputs(1, 8, 2, 4, device=device)
    weight = inputs.weight.clone().requires_grad_()
    wanting = inputs.vision.clone().requires_grad_()
    with use_backend(backend):
        for call in (lambda: score_tokens(wanting, inputs.text, weight), lambda: score_tokens(wanting, wanting)):
            with pytest.raises(ValueError, match="not differentiable in vision"):
                call()
        with pytest.raises(ValueError, match="not differentiable in text"):
            score_tokens(inputs.vision, wanting, weight)
        scores = score_tokens(inputs.vision, inputs.text, weight)
        (first,) = torch.autograd.grad(scores.square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            first.sum().backward()
