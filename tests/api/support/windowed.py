"""Tiny models for tests of text eviction, one of each family a session, with windows that the answers leave."""

from __future__ import annotations

import functools

import tiny
from transformers import PreTrainedModel

ATOL = 1e-4  # of logits behind an eviction


@functools.cache
def windowed(family: str) -> PreTrainedModel:
    """Gemma 3 with windows that the answers leave."""
    return tiny.build(family, **({"sliding_window": 20} if family == "gemma3" else {}))
