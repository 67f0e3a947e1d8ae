"""The published rules in plain torch, fp64, nothing removed: a token that was evicted is masked.

A decoder of its own, so that no library's masks, caches or rotary embeddings stand behind both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers.cases import HEAD, HEADS, KV_HEADS, LAYERS, NORM_EPS, ROPE_THETA, Case, weights
from bench.peers.records import Side

Rule = Callable[[Case, int, Tensor, Tensor], Tensor]  # layer, held, attention (rows, heads, queries, columns): held


class MaskedDecoder:
    """``held`` ``(rows, K/V heads, columns)`` bool by layer says which tokens are seen; rules change it.

    ``reindexed``: positions count the held tokens only, as StreamingLLM does.
    """

    def __init__(self, case: Case) -> None:
        self.weights = {name: weight.double() for name, weight in weights(case.decoder).items()}
        self.reindexed = case.method == "streaming-reindexed"
        self.keys = [torch.zeros(case.rows, KV_HEADS, 0, HEAD).double()] * LAYERS
        self.values = list(self.keys)
        self.held = [torch.zeros(case.rows, KV_HEADS, 0).bool()] * LAYERS
        self.attention: list[Tensor] = [torch.empty(0)] * LAYERS  # (rows, heads, queries, columns) of the last step

    def step(self, ids: Tensor) -> Tensor:
        """Logits ``(rows, vocabulary)`` behind the last of ``ids`` ``(rows, n)``."""
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(LAYERS):
            here = f"model.layers.{layer}."
            hidden = hidden + self._attend(layer, self._norm(hidden, here + "input_layernorm"))
            normed = self._norm(hidden, here + "post_attention_layernorm")
            gate = F.silu(self._linear(normed, here + "mlp.gate_proj"))
            hidden = hidden + self._linear(gate * self._linear(normed, here + "mlp.up_proj"), here + "mlp.down_proj")
        return self._linear(self._norm(hidden[:, -1], "model.norm"), "lm_head")

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        here = f"model.layers.{layer}.self_attn."
        query, key, value = (
            self._linear(x, f"{here}{name}_proj").unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in "qkv"
        )
        new = key.shape[2]
        self.keys[layer] = torch.cat([self.keys[layer], key], 2)  # unrotated
        self.values[layer] = torch.cat([self.values[layer], value], 2)
        self.held[layer] = F.pad(self.held[layer], (0, new), value=True)
        held, columns = self.held[layer], torch.arange(self.held[layer].shape[-1])
        positions = held.cumsum(-1) - 1 if self.reindexed else columns.expand_as(held)
        shared = HEADS // KV_HEADS
        keys = _rotate(self.keys[layer], positions).repeat_interleave(shared, 1)
        query = _rotate(query, positions[..., -new:].repeat_interleave(shared, 1))
        seen = held[:, :, None] & (columns <= columns[-new:, None])
        logits = (query @ keys.mT / HEAD**0.5).masked_fill(~seen.repeat_interleave(shared, 1), -torch.inf)
        self.attention[layer] = logits.softmax(-1)
        out = self.attention[layer] @ self.values[layer].repeat_interleave(shared, 1)
        return self._linear(out.transpose(1, 2).flatten(2), here + "o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * self.weights[f"{name}.weight"]


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of ``x`` ``(..., n, d)`` at ``positions`` ``(..., n)``: pairs are i and i + d/2."""
    angles = positions[..., None] * ROPE_THETA ** (-torch.arange(0, HEAD, 2) / HEAD).double()
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def tova(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """The top ``cap`` by the last query's attention, mean over all heads; nothing is protected."""
    return _top(attention[:, :, -1].mean(1, keepdim=True).expand_as(held), held, case.cap, newest=0)


def tova_newest(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """TOVA where the newest token always stays."""
    return _top(attention[:, :, -1].mean(1, keepdim=True).expand_as(held), held, case.cap, newest=1)


def snapkv(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """By the last ``window`` queries' attention, average-pooled over 5 columns; the window itself stays."""
    return _pooled_top(case, case.cap, held, attention)


def pyramidkv(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """SnapKV with a cap by layer: linear from ``2 (cap - w) - lo`` down to ``lo = (cap - w) // 20``, and the window."""
    rest = case.cap - case.window
    low = rest // 20
    high = 2 * rest - low
    if high >= case.prompt - case.window:
        high = case.prompt - case.window
        low = 2 * rest - high
    return _pooled_top(case, case.window + high - layer * ((high - low) // (LAYERS - 1)), held, attention)


def pyramidkv_of_kvpress(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """The layers' caps count the window: their mean is the cap, and the lowest is bounded by the others alone."""
    low = case.cap / 20
    high = 2 * case.cap - low
    if high >= case.prompt - case.window:
        high = case.prompt - case.window
        low = 2 * case.cap - high
    return _pooled_top(case, round(high - layer * (high - low) / (LAYERS - 1)), held, attention)


def streaming(case: Case, layer: int, held: Tensor, attention: Tensor) -> Tensor:
    """The first ``sinks`` tokens and the newest others."""
    columns = torch.arange(held.shape[-1])
    return held & ((columns < case.sinks) | (columns >= len(columns) - (case.cap - case.sinks)))


def _pooled_top(case: Case, cap: int, held: Tensor, attention: Tensor) -> Tensor:
    rows = attention[:, :, -case.window :, : -case.window].sum(2)
    scores = F.avg_pool1d(rows, 5, stride=1, padding=2).unflatten(1, (KV_HEADS, -1)).mean(2)
    return _top(F.pad(scores, (0, case.window)), held, cap, newest=case.window)


def _top(scores: Tensor, held: Tensor, cap: int, newest: int) -> Tensor:
    scores = scores.masked_fill(~held, -torch.inf).clone()
    scores[..., scores.shape[-1] - newest :] = torch.inf
    kept = torch.zeros_like(held).scatter_(-1, scores.topk(min(cap, held.shape[-1]), -1).indices, True)
    return kept & held


PUBLISHED: dict[str, Rule] = {
    "tova": tova,
    "tova-newest": tova_newest,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "streaming": streaming,
    "streaming-reindexed": streaming,
}
# what kvpress does instead, as `Case.expected` says
DESCRIBED: dict[str, Rule] = {"tova": tova_newest, "pyramidkv": pyramidkv_of_kvpress}


def run(case: Case, rule: Rule) -> Side:
    """What a rule holds and answers."""
    decoder = MaskedDecoder(case)
    prompt, fed = case.tokens()
    logits, held = [], []
    for number, ids in enumerate([prompt, *fed.split(1, 1)]):
        logits.append(decoder.step(ids))
        if number == 0 or not case.once:
            found = zip(decoder.held, decoder.attention)
            decoder.held = [rule(case, layer, *arguments) for layer, arguments in enumerate(found)]
        held.append(torch.stack([F.pad(one, (0, case.prompt + case.steps - one.shape[-1])) for one in decoder.held]))
    return Side(torch.stack(held), torch.stack(logits).float())
