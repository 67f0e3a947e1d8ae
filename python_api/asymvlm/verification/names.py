"""The one name of transformers that the checks need and that changed between versions."""

from __future__ import annotations

from typing import Any


def cache_of(output: Any) -> Any:
    """The K/V cache in what a model or its ``generate`` returned, ``past_key_values`` before 5.24; None without one."""
    found = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found
