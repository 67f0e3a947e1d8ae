"""What the checks need to know about how transformers is written, in one place."""

from __future__ import annotations

from typing import Any

from asymvlm.decoder import decoder_of


def cache_of(output: Any) -> Any:
    """The K/V cache in what a model or its ``generate`` returned, ``past_key_values`` before 5.24; None without one."""
    found = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if found is None else found


__all__ = ["cache_of", "decoder_of"]
