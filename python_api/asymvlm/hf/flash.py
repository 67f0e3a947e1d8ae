"""FlashAttention in transformers: what it takes the positions of a shortened prompt for, and what it cannot do.

It gets no mask where nothing is masked. One row with gaps in its positions then counts as several packed sequences, cut
wherever a position is 0; a row that starts behind 0 would be cut nowhere. Told that the row is one sequence it neither
guesses nor synchronises in every layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def uses_flash(text_config: Any) -> bool:
    """Whether the decoder's attention is FlashAttention 2, 3 or 4, also one from the kernels hub."""
    return "flash" in (getattr(text_config, "_attn_implementation", None) or "")


def one_sequence(decoder: nn.Module, queries: int, past: int, device: torch.device) -> dict[str, Any]:
    """Arguments that tell the attention of one row: ``queries`` tokens behind ``past``, one sequence.

    Raises:
        NotImplementedError: if the decoder hands nothing on to its attention.
    """
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise NotImplementedError(
            f"{type(decoder).__name__} passes nothing on to FlashAttention, which would cut the shortened prompt: use "
            "attn_implementation 'sdpa' or 'eager'"
        )
    ends = torch.tensor([[0, queries], [0, past + queries]], dtype=torch.int32, device=device)
    lengths = {"max_length_q": queries, "max_length_k": past + queries}
    return {"cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1], **lengths}
