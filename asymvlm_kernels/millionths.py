"""Keep ratios as whole millionths, so that every backend rounds ``N * ratio`` to the same number of tokens."""

from __future__ import annotations

MILLION = 1_000_000


def to_millionths(ratio: float) -> int:
    """Keep ratio as the nearest whole number of millionths, at least 1."""
    return max(1, round(ratio * MILLION))
