"""What a decode step is compared with. K and V are a cache of layout ``(B, G, S, D)``, as in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Tensors = tuple[torch.Tensor, ...]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """PyTorch's attention by one of its kernels: ``(B, 1, H, D)``."""
    with sdpa_kernel(BACKENDS[backend]):
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    return out.transpose(1, 2)


def packed_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """The same with the query heads of a key head as its rows: K and V are read once a group. A peer at its best."""
    B, _, H, D = q.shape
    with sdpa_kernel(BACKENDS[backend]):
        out = scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v)
    return out.reshape(B, 1, H, D)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return compiled_flex()(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return function


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_with_kvcache

    out: torch.Tensor = flash_attn_with_kvcache(q, k.transpose(1, 2), v.transpose(1, 2))
    return out


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """transformers' eager attention with ``output_attentions``, then the head mean: output and scores."""
    B, _, H, D = q.shape
    k, v = (x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).reshape(B, H, -1, D) for x in (k, v))
    weights = (q.transpose(1, 2) @ k.mT) * D**-0.5
    weights = weights.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights[:, :, -1].float().mean(1)


def gather_layers(index: torch.Tensor, tensors: Tensors) -> Tensors:
    """Compaction as one writes it: each layer's kept slots ``index (B, kept)`` gathered into new tensors."""
    return tuple(x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in tensors)


def fill_layers(source: torch.Tensor, target: torch.Tensor, tensors: Tensors) -> Tensors:
    """The hole-fill by indexing, layer by layer. Nothing may be padded."""
    batch = torch.arange(len(source), device=source.device)[:, None]
    for x in tensors:
        x.transpose(1, 2)[batch, target] = x.transpose(1, 2)[batch, source]
    return ()
