"""The sizes that are measured: tokens and widths of real models, and tiny ones that test the harness."""

from __future__ import annotations

from dataclasses import dataclass

from asymvlm_kernels.budget import MILLION, to_millionths


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


SINGLES = (
    Shape("phi3.5-v", 1, 2500, 3072, 30),
    Shape("gemma3", 1, 256, 3840, 30),
    Shape("gemma3-4-images", 1, 1024, 3840, 500),
    Shape("llava-next", 1, 2880, 4096, 30),
    Shape("qwen2.5-vl", 1, 4096, 3584, 30),
    Shape("qwen2.5-vl-16k", 1, 16384, 3584, 30),
)
BATCHES = (  # gigabytes: for a GPU
    Shape("phi3.5-v-b8", 8, 2500, 3072, 30),
    Shape("phi3.5-v-b64", 64, 2500, 3072, 30),
)
SMOKE = (Shape("edge", 1, 1, 16, 1), Shape("odd", 2, 37, 70, 5))
COMPILED = ("phi3.5-v", "gemma3", "phi3.5-v-b64", "odd")  # on a GPU: autotuning takes too long for every size


def shapes_for(device: str, smoke: bool = False) -> tuple[Shape, ...]:
    """The sizes measured on a device type, ``"cpu"`` or ``"cuda"``."""
    if smoke:
        return SMOKE
    return SINGLES if device == "cpu" else SINGLES + BATCHES
