"""Answer a batch of prompts under one setting, and measure what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.app.session import Session
from asymvlm.evaluation.arms import Arm
from asymvlm.hf.arguments import IDS, cache_of
from asymvlm.hf.generation import setting
from asymvlm.models.flops import cache_bytes
from asymvlm.patch import patch

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Answered:
    """What one batch gave. Lists have one entry a row."""

    texts: list[str]
    new_tokens: list[int]  # the end of text included
    report: Any  # `asymvlm.PruningReport`
    first_token_ms: float
    decode_ms: float
    kv_bytes: int | None
    peak_bytes: int | None


class FirstToken:
    """A streamer that notes when the first token of a batch is there; tokens reach it on the host."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.calls, self.at = clock, 0, clock()

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1  # the prompt comes first
        if self.calls == 2:
            self.at = self.clock()

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def answer(
    session: Session, arm: Arm, inputs: Mapping[str, Any], max_new_tokens: int, clock: Clock = time.perf_counter
) -> Answered:
    """Greedy answers to the prompts of ``inputs``, padded on the left, under ``arm``.

    Raises:
        ValueError, NotImplementedError: as a patched call does.
    """
    cuda = session.device.type == "cuda"
    with patch(session.model, vision=arm.vision, cache=arm.cache) as handle:
        if cuda:
            torch.cuda.synchronize(session.device)
            torch.cuda.reset_peak_memory_stats(session.device)
        begun, first = clock(), FirstToken(clock)
        output = session.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            streamer=first,
        )
        if cuda:
            torch.cuda.synchronize(session.device)
        ended = clock()
        report = handle.last
    tokens = output.sequences[:, inputs[IDS].shape[1] :]
    tokenizer = getattr(session.processor, "tokenizer", session.processor)
    return Answered(
        texts=[text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)],
        new_tokens=count_new(tokens, setting(session.model, {}, "eos_token_id")),
        report=report,
        first_token_ms=1000 * (first.at - begun),
        decode_ms=1000 * (ended - first.at),
        kv_bytes=cache_bytes(cache_of(output)),
        peak_bytes=torch.cuda.max_memory_allocated(session.device) if cuda else None,
    )


def count_new(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> list[int]:
    """How many of ``(B, T)`` generated tokens each row has: up to its first end of text, that one included."""
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    before = ended.long().cumsum(1) - ended.long()  # ends in front of each token
    counts: list[int] = (before == 0).sum(1).tolist()
    return counts


__all__ = ["Answered", "Clock", "answer", "count_new"]
