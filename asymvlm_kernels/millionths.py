"""Keep ratios as whole millionths, so that every backend rounds ``N * ratio`` to the same number of tokens."""

from __future__ import annotations

from typing import Any

MILLION = 1_000_000


def to_millionths(ratio: float) -> int:
    """Keep ratio as the nearest whole number of millionths, at least 1."""
    return max(1, round(ratio * MILLION))


def part_of(count: Any, share: float) -> Any:
    """``floor(share * count)``, exactly to a millionth; of a number or an integer tensor."""
    return count * round(share * MILLION) // MILLION
