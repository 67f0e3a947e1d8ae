"""The sizes that are measured: tokens and widths of real models, and tiny ones that test the harness."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from asymvlm_kernels import testing
from asymvlm_kernels.millionths import MILLION, to_millionths


@dataclass(frozen=True)
class Shape:
    """One prefill problem. Axes: B batch, N vision tokens, D width, L text tokens."""

    name: str
    B: int
    N: int
    D: int
    L: int
    keep: float = 0.65  # uniform keep ratio

    @property
    def K(self) -> int:
        """Kept vision tokens of a sample, in the exact integers of `keep_counts`."""
        return min(max(self.N * to_millionths(self.keep) // MILLION, 1), self.N)

    @property
    def S(self) -> int:
        """Length of the merged sequence: vision and text."""
        return self.N + self.L


def slug(name: str) -> str:
    """A name for the shell and for keys: ``gemma-3-12b-4-images``."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


SINGLES = tuple(Shape(slug(shape.name), 1, shape.N, shape.D, shape.L) for shape in testing.SHAPES)
FIRST, SMALL = SINGLES[:2]
# gigabytes: for a GPU
BATCHES = tuple(replace(FIRST, name=f"{FIRST.name}-b{batch}", B=batch) for batch in (8, 64))
SMOKE = (Shape("edge", 1, 1, 16, 1), Shape("odd", 2, 37, 70, 5))
COMPILED = (FIRST, SMALL, BATCHES[-1])  # on a GPU: autotuning takes too long for every size


def shapes_for(device: str, smoke: bool = False) -> tuple[Shape, ...]:
    """The sizes measured on a device type, ``"cpu"`` or ``"cuda"``."""
    if smoke:
        return SMOKE
    return SINGLES if device == "cpu" else SINGLES + BATCHES
