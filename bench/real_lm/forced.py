"""A text forced through a patched model token by token, and how well the model foretold it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asymvlm
from asymvlm.hf.arguments import Callee, cache_of
from bench.real_lm.entries import FORCED, PROMPT, SCORED

CAP = "final_logit_softcapping"
ROWS = 64  # of logits at a time: a vocabulary of 262144 makes 64 MiB of them


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of `weights.unpacked`, ready for texts shorter than its windows.

    Windows that no text here leaves are widened to the model's whole reach, which changes no number and lets every
    layer give up tokens: in windowed layers they would stay visible.

    Raises:
        ValueError: if a window is shorter than a block.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        if window < PROMPT + FORCED:
            raise ValueError(f"blocks of {PROMPT + FORCED} tokens leave the window of {window} tokens")
        model.config.sliding_window = model.config.max_position_embeddings
    return model, AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def headless(model: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Without its head, which is given: a step then returns hidden states, and the head is applied to many at once."""
    head, cap = model.lm_head, getattr(model.config, CAP, None)

    def logits(states: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = head(states)
        return made if cap is None else cap * torch.tanh(made / cap)

    model.lm_head = nn.Identity()
    if cap is not None:
        setattr(model.config, CAP, None)
    try:
        yield logits
    finally:
        model.lm_head = head
        if cap is not None:
            setattr(model.config, CAP, cap)


@torch.inference_mode()
def loss(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> tuple[list[float], float]:
    """Mean negative log-likelihood of each block's last tokens, and the tokens that a row holds at the end.

    Args:
        ids: ``(blocks, PROMPT + FORCED)``. settings: arguments of `asymvlm.patch`; none evicts nothing.
    """
    hidden, name = [], Callee.of(type(model).forward).cache
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(headless(model))
        if settings:
            stack.enter_context(asymvlm.patch(model, **settings))
        output = model(input_ids=ids[:, :PROMPT], use_cache=True)
        for column in range(PROMPT, PROMPT + FORCED - 1):
            output = model(input_ids=ids[:, column : column + 1], use_cache=True, **{name: cache_of(output)})
            if column >= PROMPT + FORCED - SCORED - 1:
                hidden.append(output.logits[:, -1])
        cache = cache_of(output)
    states, wanted = torch.stack(hidden, 1).flatten(0, 1), ids[:, -SCORED:].flatten()
    parts = []
    for some, target in zip(states.split(ROWS), wanted.split(ROWS)):
        parts.append(nn.functional.cross_entropy(head(some), target, reduction="none"))
    return torch.cat(parts).view(-1, SCORED).mean(1).tolist(), held(cache)


def held(cache: Any) -> float:
    """Tokens of a row, the mean over layers, K/V heads and rows."""
    tables = getattr(cache, "tables", None)
    if tables is None:
        return float(cache.get_seq_length())
    counts = [(table.slot_pos >= 0).sum(1).float().mean() for table in tables]
    return float(torch.stack(counts).mean())


__all__ = ["headless", "held", "load", "loss"]
