"""Sizes of the ops that other methods are made of: the vision tokens of two LLaVA models, and tiny ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodShape:
    """N tokens of each of B samples, K of them kept. ``width``: of the tower's features; H, G, D: of attention."""

    name: str
    B: int
    N: int
    K: int
    width: int
    H: int
    G: int
    D: int


SINGLES = (
    MethodShape("llava-next", 1, 2880, 640, width=1024, H=32, G=8, D=128),
    MethodShape("llava-1.5", 1, 576, 128, width=1024, H=32, G=32, D=128),
)
SMOKE = (
    MethodShape("edge", 1, 1, 1, width=16, H=1, G=1, D=16),
    MethodShape("odd", 2, 37, 9, width=70, H=6, G=2, D=70),
)


def method_shapes_for(device: str, smoke: bool = False) -> tuple[MethodShape, ...]:
    """The sizes measured, the same on every device."""
    return SMOKE if smoke else SINGLES
