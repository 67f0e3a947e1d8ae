"""Attention straight from its definition, one query row at a time, and what random calls of the decode ops share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm_kernels import flash_attn_with_kvcache


@dataclass
class Call:
    """Inputs of `flash_attn_with_kvcache` and the options that decide who sees what."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> Any:
        return flash_attn_with_kvcache(self.q, self.k, self.v, **self.options | more)

    def sample(self, b: int) -> Call:
        """Sample ``b`` alone."""
        one = {name: x[b : b + 1] if isinstance(x, torch.Tensor) else x for name, x in self.options.items()}
        return Call(self.q[b : b + 1], self.k[b : b + 1], self.v[b : b + 1], one)

    def visible(self, b: int, i: int) -> list[int]:
        """The slots that row ``i`` of sample ``b`` sees."""
        option = self.options.get
        Q, S = self.q.shape[1], self.k.shape[1]
        end = S if option("cache_seqlens") is None else int(option("cache_seqlens")[b])
        first = 0 if option("cache_leftpad") is None else int(option("cache_leftpad")[b])
        left, right = option("window_size", (-1, -1))
        right = 0 if option("causal") else right
        seen = []
        for slot in range(first, min(end, S)):
            position, own = slot, end - Q + i
            if option("slot_pos") is not None:
                position, given = int(option("slot_pos")[b, slot]), option("q_pos")
                own = int(given[b, i]) if given.ndim == 2 else int(given[b]) - (Q - 1 - i)
                if not 0 <= position <= own:
                    continue
            if (left < 0 or position >= own - left) and (right < 0 or position <= own + right):
                seen.append(slot)
        return seen


def attend(call: Call, dtype: torch.dtype, score_rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, logsumexp and scores, computed in ``dtype``: probabilities are rounded to it, as eager attention does."""
    B, Q, H, D = call.q.shape
    S, G = call.k.shape[1:3]
    scale, cap = call.options.get("softmax_scale") or D**-0.5, call.options.get("softcap", 0.0)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, lse = torch.zeros(B, Q, H, D, dtype=dtype), torch.full((B, H, Q), float("inf"), dtype=wide)
    scores = torch.zeros(B, S, dtype=wide)
    for b in range(B):
        for i in range(Q):
            seen = call.visible(b, i)
            if not seen:
                continue
            for g in range(G):
                heads = slice(g * (H // G), (g + 1) * (H // G))
                logits = (q[b, i, heads] @ k[b, seen, g].mT) * scale
                if cap:
                    logits = cap * torch.tanh(logits / cap)
                lse[b, heads, i] = logits.to(wide).logsumexp(-1)
                weights = logits.to(wide).softmax(-1).to(dtype)
                out[b, i, heads] = weights @ v[b, seen, g]
                if i >= Q - score_rows:
                    scores[b, seen] += weights.to(wide).sum(0) / (H * score_rows)
    return out, lse, scores


def make_call(
    B: int,
    Q: int,
    H: int,
    G: int,
    S: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
    lengths: list[int] | None = None,
    leftpad: list[int] | None = None,
    slots: bool = False,
    **options: Any,
) -> Call:
    """Random inputs; K and V are views of a ``(B, G, S, D)`` cache. ``slots``: in random order, with holes."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Q, H, D, generator=generator)
    k, v = (torch.randn(B, G, S, D, generator=generator) for _ in range(2))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    if lengths is not None:
        options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    if leftpad is not None:
        options["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32, device=device)
    if slots:
        order = torch.stack([torch.randperm(S, generator=generator) for _ in range(B)]).int()
        free = torch.rand(B, S, generator=generator) < 0.25
        options["slot_pos"] = order.masked_fill(free, -1).to(device)
        last = torch.arange(S - 1, S - 1 - B, -1)
        options["q_pos"] = (last[:, None] - torch.arange(Q - 1, -1, -1)).to(device)
    return Call(q, k.transpose(1, 2), v.transpose(1, 2), options)
