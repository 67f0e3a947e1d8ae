"""NVIDIA kvpress (https://github.com/NVIDIA/kvpress), in its own environment: ``python -m bench.peers.kvpress OUT``.

Its presses move keys without saying which tokens they were, so each press is watched: a row of keys that it returns is
looked up among those that it was given.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.cases import KV_CASES, LAYERS, Case, text_config, weights
from bench.peers.records import Side

VERSIONS = ("kvpress", "transformers", "torch")


class Ledger:
    """Columns of the tokens in each layer's cache, ``(rows, K/V heads, slots)`` int64, in the order of the slots."""

    def __init__(self) -> None:
        self.columns: dict[int, Tensor] = {}
        self.seen: dict[int, int] = {}

    def grow(self, layer: int, keys: Tensor) -> Tensor:
        """The columns of ``keys`` ``(rows, heads, slots, d)``, new tokens being at the end."""
        before = self.columns.get(layer, torch.zeros(*keys.shape[:2], 0, dtype=torch.long))
        new = keys.shape[2] - before.shape[2]
        first = self.seen.get(layer, 0)
        self.seen[layer] = first + new
        self.columns[layer] = torch.cat([before, torch.arange(first, first + new).expand(*keys.shape[:2], new)], 2)
        return self.columns[layer]

    def shrink(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Note which of the rows ``before`` are those ``after``; V is looked at, which no press rotates."""
        same = (after[:, :, :, None] == before[:, :, None]).all(-1)  # (rows, heads, kept, slots)
        if not (same.sum(-1) == 1).all():
            raise RuntimeError("a kept value must be one of those before, and only one")
        self.columns[layer] = self.columns[layer].gather(2, same.to(torch.int8).argmax(-1))


def watched(press: Any, ledger: Ledger) -> Any:
    """The press, which now notes what it keeps."""
    compress = press.compress

    def noting(module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Any:
        ledger.grow(module.layer_idx, keys)
        found = compress(module, hidden, keys, values, attentions, kwargs)
        ledger.shrink(module.layer_idx, values, found[1])
        return found

    press.compress = noting
    return press


def press_of(case: Case, ledger: Ledger) -> Any:
    """The press of kvpress that does what the case asks for."""
    import kvpress

    share = 1 - (case.cap + 0.5) / case.prompt  # half a token more: it rounds down
    if case.method.startswith("tova"):
        press = kvpress.TOVAPress
        decoding = kvpress.DecodingPress(watched(press(), ledger), compression_interval=1, target_size=case.cap)
        if case.cap >= case.prompt:
            return decoding
        return kvpress.PrefillDecodingPress(watched(press(share), ledger), decoding)
    if case.method == "streaming" and not case.once:
        base = watched(kvpress.StreamingLLMPress(n_sink=case.sinks), ledger)
        decoding = kvpress.DecodingPress(base, compression_interval=1, target_size=case.cap)
        first = watched(kvpress.StreamingLLMPress(share, n_sink=case.sinks), ledger)
        return kvpress.PrefillDecodingPress(first, decoding)
    if case.method == "streaming":
        return watched(kvpress.StreamingLLMPress(share, n_sink=case.sinks), ledger)
    if case.method == "streaming-reindexed":
        return watched(kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(share, n_sink=case.sinks)), ledger)
    if case.method == "pyramidkv":  # it rounds by itself
        return watched(kvpress.PyramidKVPress(1 - case.cap / case.prompt, window_size=case.window), ledger)
    return watched(kvpress.SnapKVPress(share, window_size=case.window), ledger)


def model_of(case: Case) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, kind = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[case.decoder]
    model = kind(config(**text_config(), attn_implementation="eager" if case.eager else "sdpa")).eval()
    model.load_state_dict(weights(case.decoder), strict=True)
    return model


@torch.inference_mode()
def run(case: Case) -> Side:
    """What kvpress holds and answers; positions are passed as its own pipeline does."""
    from transformers import DynamicCache

    model, ledger = model_of(case), Ledger()
    press, cache = press_of(case, ledger), DynamicCache()
    layers: Any = cache.layers
    prompt, fed = case.tokens()
    held = torch.zeros(1 + case.steps, LAYERS, case.rows, model.config.num_key_value_heads, case.prompt + case.steps)
    logits = []
    with press(model):
        for number, ids in enumerate([prompt, *fed.split(1, 1)]):
            first = 0 if number == 0 else case.prompt + number - 1
            if case.method == "streaming-reindexed" and number:
                first = cache.get_seq_length()
            positions = torch.arange(first, first + ids.shape[1])[None]
            logits.append(model(ids, past_key_values=cache, position_ids=positions).logits[:, -1])
            for layer in range(LAYERS):
                held[number, layer].scatter_(2, ledger.grow(layer, layers[layer].keys), 1)
    return Side(held.bool(), torch.stack(logits), {name: metadata.version(name) for name in VERSIONS})


def main(out: Path) -> None:
    for case in KV_CASES:
        run(case).save(out / f"{case.name}.safetensors")
        print(f"kvpress: {case.name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
