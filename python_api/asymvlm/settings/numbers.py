"""Counts and shares in settings: how they are checked."""

from __future__ import annotations

from asymvlm_kernels.millionths import MILLION


def check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_retention(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 / MILLION <= value <= 1:
        raise ValueError(f"retention must be in (0, 1], got {value!r}")
