"""key_bias_attention: the definition, its gradients, padding, grouped heads, odd sizes, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asymvlm_kernels import use_backend
from asymvlm_kernels._triton import INTERPRETED
from asymvlm_kernels.testing import assert_as_accurate
from asymvlm_kernels.training.attention import key_bias_attention

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
SHAPES = [  # B, S, H, G, head_dim, padded keys at the left
    (1, 1, 1, 1, 16, 0),
    (2, 37, 4, 2, 24, 5),
    (1, 70, 2, 1, 64, 0),
    (1, 66, 2, 2, 96, 3),
    (1, 65, 1, 1, 128, 0),
    (1, 40, 2, 1, 256, 0),
]


def inputs(shape, dtype, device="cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as a decoder makes them, heads before places in memory, and the bias; a whole block may be closed."""
    B, S, H, G, D, padded = shape
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(B, n, S, D, generator=generator).to(device, dtype).transpose(1, 2) for n in (H, G, G))
    bias = torch.randn(B, S, generator=generator).mul(2).to(device)
    bias[-1, :padded] = float("-inf")
    return q, k, v, bias


def literal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eager attention, as transformers writes it, in the dtype of q; rows that see nothing give zeros."""
    S, H, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    seen = torch.ones(S, S, dtype=torch.bool, device=q.device).tril() & bias.isfinite()[:, None, None]
    logits = torch.einsum("bmhd,bshd->bhms", q, k) * D**-0.5 + bias[:, None, None].to(q.dtype).nan_to_num(neginf=0)
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0).to(q.dtype)
    return torch.einsum("bhms,bshd->bmhd", weights, v)


def run(function, tensors, grad) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_and_gradients(shape, dtype, backend, device):
    q, k, v, bias = inputs(shape, dtype, device)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    exact = run(literal, [x.double() for x in (q, k, v, bias)], grad.to(dtype))
    same = run(literal, [q, k, v, bias], grad)
    with use_backend(backend):
        found = run(key_bias_attention, [q, k, v, bias], grad)
    assert [x.dtype for x in found] == [dtype, dtype, dtype, dtype, torch.float32]
    assert_as_accurate(found[0], same[0], exact[0])
    for result, rough, right in zip(found[1:], same[1:], exact[1:], strict=True):
        # sums in another order, of terms that cancel: three times eager's error, or 16 roundings of the largest
        allowed = max(3 * float((rough.double() - right).abs().max()), 2**-19 * max(float(right.abs().max()), 1))
        assert float((result.double() - right).abs().max()) <= allowed
    closed = ~bias.isfinite()
    for gradient in (found[2], found[3], found[4]):
        assert not gradient[closed].any()


@BACKENDS
def test_a_query_that_sees_no_key_gives_zeros(backend, device):
    q, k, v, bias = inputs((1, 20, 2, 1, 16, 20), torch.float32, device)
    with use_backend(backend):
        for tensor in run(key_bias_attention, [q, k, v, bias], torch.ones_like(q)):
            assert not tensor.any()


@BACKENDS
def test_the_same_bits_each_time_and_alone(backend, device):
    q, k, v, bias = inputs((2, 40, 2, 1, 16, 4), torch.float32, device)
    grad = torch.randn_like(q)
    with use_backend(backend):
        first = run(key_bias_attention, [q, k, v, bias], grad)
        again = run(key_bias_attention, [q, k, v, bias], grad)
        alone = run(key_bias_attention, [x[1:] for x in (q, k, v, bias)], grad[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if backend == "triton":  # the blocks do not depend on the batch; a product of PyTorch may
        assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))


@BACKENDS
def test_strides_and_scale(backend, device):
    """A last axis that is not contiguous, one row of a larger tensor, and a scale of the caller's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 16, heads, device=device).transpose(2, 3) for heads in (4, 2, 2))
    bias = torch.randn(1, 18, device=device)[:, ::2]
    with use_backend(backend):
        found = key_bias_attention(q, k, v, bias, scale=0.5)
    assert torch.allclose(found, literal(q * (0.5 * 16**0.5), k, v, bias), atol=1e-5)


def test_gradcheck():
    tensors = [x.double().requires_grad_() for x in inputs((2, 7, 4, 2, 3, 0), torch.float32)]
    assert torch.autograd.gradcheck(key_bias_attention, tensors)


def test_gradcheck_across_chunks_of_rows(monkeypatch):
    monkeypatch.setattr("asymvlm_kernels.training.reference.ROWS", 4)
    tensors = [x.double().requires_grad_() for x in inputs((1, 10, 2, 1, 3, 0), torch.float32)]
    assert torch.autograd.gradcheck(key_bias_attention, tensors)


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")  # tracing is the next test's


class TestRegistration:
    @pytest.fixture
    def guarded_scratch(self) -> None:
        """Off: opcheck compares the storage of a result with that of its fake."""

    @BACKENDS
    def test_opcheck(self, backend, device):
        q, k, v, bias = (x.requires_grad_() for x in inputs((1, 6, 2, 1, 16, 0), torch.float32, device))
        with use_backend(backend):
            torch.library.opcheck(
                torch.ops.asymvlm.key_bias_attention.default, (q, k, v, bias, 0.25), test_utils=CHECKS
            )
            out, lse = torch.ops.asymvlm.key_bias_attention(*(x.detach() for x in (q, k, v, bias)), 0.25)
            arguments = (out, *(x.detach() for x in (q, k, v, bias)), out, lse, 0.25)
            torch.library.opcheck(torch.ops.asymvlm.key_bias_attention_grad.default, arguments, test_utils=CHECKS)

    @BACKENDS
    def test_compiles_without_a_graph_break(self, backend, device):
        if backend == "triton" and INTERPRETED:
            mode = "aot_eager"
        else:
            mode = "eager" if device.type == "cpu" else "inductor"
        tensors = inputs((1, 12, 2, 1, 16, 0), torch.float32, device)
        compiled = torch.compile(lambda *args: key_bias_attention(*args) * 2, fullgraph=True, backend=mode)
        with use_backend(backend):
            wanted = run(lambda *args: key_bias_attention(*args) * 2, tensors, torch.ones_like(tensors[0]))
            found = run(compiled, tensors, torch.ones_like(tensors[0]))
        assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=torch.zeros(1, 4, 3, 16)), "the 3 heads of q must be a multiple of the 2 heads"),
        (dict(k=torch.zeros(1, 5, 2, 16)), r"k must have shape \(1, 4, G, 16\), got \(1, 5, 2, 16\)"),
        (dict(v=torch.zeros(1, 4, 2, 16).half()), "v must be float32, got float16"),
        (dict(bias=torch.zeros(1, 4).double()), "bias must be float32, got float64"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \(1, 4\), got \(4,\)"),
        (dict(q=torch.zeros(1, 4, 4, 16, dtype=torch.long)), "q must be float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    tensors = dict(zip("qkv", (torch.zeros(1, 4, heads, 16) for heads in (4, 2, 2))), bias=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=message):
        key_bias_attention(**(tensors | change))


def test_too_wide_heads_are_refused():
    q = torch.zeros(1, 2, 1, 272)
    with pytest.raises(ValueError, match=r"head_dim must be in 1..256, got 272"):
        key_bias_attention(q, q, q, torch.zeros(1, 2))


@BACKENDS
def test_a_gradient_of_the_gradient_is_refused(backend, device):
    leaves = [x.requires_grad_() for x in inputs((1, 5, 2, 1, 16, 0), torch.float32, device)]
    with use_backend(backend):
        grads = torch.autograd.grad(key_bias_attention(*leaves).square().sum(), leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match="key_bias_attention is differentiable once"):
                grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale must be a finite number, got {scale}"):
        key_bias_attention(*inputs((1, 5, 2, 1, 16, 0), torch.float32), scale=scale)
