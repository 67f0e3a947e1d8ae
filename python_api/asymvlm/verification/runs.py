"""One call of ``generate``, greedy or along given tokens, and what of it is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from asymvlm.verification.closed import ClosedColumns, closed_columns
from asymvlm.verification.names import cache_of, decoder_of


@dataclass(eq=False)
class Run:
    """A prefill and some steps. The cache is gone by the time this is made."""

    tokens: torch.Tensor  # (B, steps)
    logits: torch.Tensor  # (B, steps, V) fp32, the first ones those of the prompt's last token
    hidden: torch.Tensor  # (B, S, D) last hidden states of the prompt
    kv_columns: list[int]  # K/V columns of each full-attention layer after the prefill

    def row(self, number: int) -> Run:
        part = slice(number, number + 1)
        return Run(self.tokens[part], self.logits[part], self.hidden[part], self.kv_columns)


@torch.no_grad()
def run(
    model: Any,
    inputs: Mapping[str, Any],
    steps: int,
    *,
    forced: torch.Tensor | None = None,
    each_step: Callable[[Any], None] | None = None,
) -> Run:
    """Generate ``steps`` tokens, the likeliest or ``forced`` ``(B, steps)``; end-of-text does not stop a run.

    ``each_step`` gets the cache after every forward pass.
    """
    steer = _Steer(forced)
    prefill: list[torch.Tensor] = []

    def keep_hidden(module: Any, args: Any, output: Any) -> None:
        if not steer.tokens and output is not None:
            prefill[:] = [output[0]]  # the last one before the first token: a patched model may record others before

    def after_forward(module: Any, args: Any, output: Any) -> None:
        if each_step is not None:
            each_step(cache_of(output))

    hooks = [decoder_of(model).register_forward_hook(keep_hidden), model.register_forward_hook(after_forward)]
    try:
        with _plain_generation(model):
            output = model.generate(
                **inputs,
                max_new_tokens=steps,
                do_sample=False,
                use_cache=True,
                return_dict_in_generate=True,
                logits_processor=LogitsProcessorList([steer]),
            )
    finally:
        for hook in hooks:
            hook.remove()
    layers = getattr(cache_of(output), "layers", ())
    full = [layer.keys for layer in layers if _holds_keys(layer) and not getattr(layer, "is_sliding", False)]
    kv_columns = [keys.shape[-2] - (steps - 1) for keys in full]
    hidden = prefill[0].to(output.sequences.device)  # the decoder may be spread over several
    return Run(torch.cat(steer.tokens, 1), torch.stack(steer.logits, 1), hidden, kv_columns)


def masked_run(
    model: Any, inputs: Mapping[str, Any], steps: int, columns: ClosedColumns, forced: torch.Tensor | None = None
) -> Run:
    """`run` on an unpatched model that does not see some columns."""
    with closed_columns(model, columns):
        return run(model, inputs, steps, forced=forced)


class _Steer(LogitsProcessor):
    """Records the logits of every step and leaves one token to choose."""

    def __init__(self, forced: torch.Tensor | None) -> None:
        self.forced = forced
        self.tokens: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = len(self.tokens)
        token = scores.argmax(-1, keepdim=True) if self.forced is None else self.forced[:, step : step + 1]
        self.tokens.append(token.to(scores.device))
        self.logits.append(scores.float().clone())
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[-1], 0.0)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """No penalties, no end of text, no special cache: settings that would hide logits or end a comparison early."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id, pad_token_id=pad_token(model), eos_token_id=None
    )
    try:
        yield
    finally:
        model.generation_config = before


def pad_token(model: Any) -> int:
    """An id to pad with; padding is masked, so any id that is no image will do."""
    config = model.config.get_text_config()
    found = [getattr(source, "pad_token_id", None) for source in (model.generation_config, config)]
    return next((int(token) for token in found if token is not None and token >= 0), 0)


def _holds_keys(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, torch.Tensor) and keys.numel() > 0
