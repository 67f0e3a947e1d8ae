"""Causal attention with a bias for every key, the same in all heads: ``softmax(q k^T * scale + bias) v``.

Training the learned weight adds one penalty a key to every layer and head. FlashAttention takes no bias; an additive
mask costs S x S numbers a layer, and as many in its gradient. Here the bias is read as S numbers, and its gradient is
summed over queries and the heads of a group inside the kernel that computes those of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm_kernels._checks import FLOATS, check_device, check_dtype, check_no_transform, check_number, check_shape
from asymvlm_kernels._triton import triton
from asymvlm_kernels.dispatch import define_backward, define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.training import reference
from asymvlm_kernels.training.kernels import (
    _key_bias_attention_kernel,
    _key_bias_delta_kernel,
    _key_bias_grad_key_kernel,
    _key_bias_grad_query_kernel,
)
from asymvlm_kernels.tuning.training import attention_config

WIDEST = 256  # head_dim
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@remember
def _key_bias_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_rows(tensor) for tensor in (q, k, v))
    out, lse = _key_bias_attention_fake(q, k, v, bias, scale)
    (B, S, H, D), G = q.shape, k.shape[2]
    if out.numel() == 0:
        return out, lse
    config = attention_config(D, q.dtype, "forward")
    launch(
        _key_bias_attention_kernel,
        (triton.cdiv(S, config.block_m), B * H),
        q,
        k,
        v,
        bias.contiguous(),
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        S,
        H,
        SCALE=scale,
        GROUP=H // G,
        D=D,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=_width(D),
        VECTOR=_vector(q, k, v),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def _key_bias_attention_grad_triton(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> Grads:
    grad, q, k, v = (_rows(tensor) for tensor in (grad, q, k, v))
    bias = bias.contiguous()
    grads = _key_bias_attention_grad_fake(grad, q, k, v, bias, out, lse, scale)
    grad_q, grad_k, grad_v, grad_bias = grads
    (B, S, H, D), G = q.shape, k.shape[2]
    if grad_q.numel() == 0:
        return grad_q, grad_k, grad_v, grad_bias.zero_()
    delta = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    by_group = torch.empty((B, G, S), dtype=torch.float32, device=q.device)
    vector = _vector(grad, q, k, v)
    sizes: dict[str, Any] = {"D": D, "BLOCK_D": _width(D), "VECTOR": vector}
    launch(
        _key_bias_delta_kernel,
        (triton.cdiv(S, 32), B * H),
        grad,
        out,
        delta,
        *grad.stride()[:3],
        S,
        H,
        BLOCK_M=32,
        num_warps=4,
        **sizes,
    )
    inputs = (grad, q, k, v, bias, lse, delta)
    strides = tuple(stride for tensor in (grad, q, k, v) for stride in tensor.stride()[:3])
    config = attention_config(D, q.dtype, "key")
    launch(
        _key_bias_grad_key_kernel,
        (triton.cdiv(S, config.block_n), B * G),
        *inputs,
        grad_k,
        grad_v,
        by_group,
        *strides,
        S,
        G,
        SCALE=scale,
        GROUP=H // G,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **sizes,
    )
    config = attention_config(D, q.dtype, "query")
    launch(
        _key_bias_grad_query_kernel,
        (triton.cdiv(S, config.block_m), B * H),
        *inputs,
        grad_q,
        *strides,
        S,
        H,
        SCALE=scale,
        GROUP=H // G,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **sizes,
    )
    torch.sum(by_group, 1, out=grad_bias)  # the groups in a fixed order: no atomics, the same bits each time
    return grads


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _width(D: int) -> int:
    return max(1 << (D - 1).bit_length(), 16)


def _vector(*tensors: torch.Tensor) -> int:
    """Elements that divide every row's offset: 16 bytes of them, or 1."""
    wide = 16 // tensors[0].itemsize
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return wide if all(number % wide == 0 for number in (tensors[0].shape[-1], *strides)) else 1


def _key_bias_attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, D = q.shape
    out = empty((B, S, H, D), dtype=q.dtype, device=q.device)
    return out, empty((B, H, S), dtype=bias.dtype, device=q.device)


def _key_bias_attention_grad_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> Grads:
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return grad_q, grad_k, grad_v, torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)


_key_bias_attention = define_op(
    "key_bias_attention(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> (Tensor out, Tensor lse)",
    reference=reference.key_bias_attention,
    triton=_key_bias_attention_triton,
    fake=_key_bias_attention_fake,
)
_key_bias_attention_grad = define_op(
    "key_bias_attention_grad(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor out, Tensor lse, "
    "float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    reference=reference.key_bias_attention_grad,
    triton=_key_bias_attention_grad_triton,
    fake=_key_bias_attention_grad_fake,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_key_bias_attention_grad(grad, *ctx.saved_tensors, ctx.scale), None)


def _refuse_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError("key_bias_attention is differentiable once, and a gradient of its gradient was asked for")


define_backward("key_bias_attention", _backward, _save_for_backward)
define_backward("key_bias_attention_grad", _refuse_backward, lambda ctx, inputs, output: None)


def key_bias_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention whose logits get one more term for each key, the same in all heads.

    Args:
        q: ``(B, S, H, head_dim)`` fp32, fp16 or bf16, head_dim up to 256.
        k, v: ``(B, S, G, head_dim)``, dtype and device of ``q``; H is a multiple of G. Any strides.
        bias: ``(B, S)`` fp32, in units of logits; -inf closes a key (padding). A key is seen by queries at its place
            and behind it.
        scale: of the products; None means ``head_dim ** -0.5``.
    Returns:
        ``(B, S, H, head_dim)``, dtype of ``q``. Zeros for a query that sees no open key.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or a ``scale`` that is not finite.

    Differentiable once, backwards and outside torch.func, in all four tensors; a closed key gets a gradient of 0.
    Memory beside inputs, outputs and their gradients is one fp32 number a query and head, and one more backward. The
    same bits each time on one backend; fp32 accumulation; does not synchronise. The reference takes float64 too, with a
    float64 bias.
    """
    check_shape("q", q, ("B", "S", "H", "head_dim"))
    B, S, H, D = q.shape
    check_shape("k", k, (B, S, "G", D))
    G = k.shape[2]
    check_shape("v", v, (B, S, G, D))
    check_shape("bias", bias, (B, S))
    check_dtype("q", q, (*FLOATS, torch.float64))
    check_dtype("bias", bias, (torch.float64 if q.dtype == torch.float64 else torch.float32,))
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
        check_device(name, tensor, q)
    check_device("bias", bias, q)
    if G == 0 or H % G:
        raise ValueError(f"the {H} heads of q must be a multiple of the {G} heads of k and v")
    if not 0 < D <= WIDEST:
        raise ValueError(f"head_dim must be in 1..{WIDEST}, got {D}")
    check_no_transform("key_bias_attention", q=q, k=k, v=v, bias=bias)
    if scale is not None:
        check_number("scale", scale)
    out: torch.Tensor = _key_bias_attention(q, k, v, bias, D**-0.5 if scale is None else scale)[0]
    return out


__all__ = ["key_bias_attention"]
