"""The sizes of one decode step: heads and layers of real models at three lengths, and tiny ones for the harness."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DecodeShape:
    """One token of each of B samples against S slots. H query heads share G key heads of width D, in ``layers``."""

    name: str
    B: int
    S: int
    H: int
    G: int
    D: int
    layers: int
    keep: float = 0.75  # share of the slots that survives an eviction

    @property
    def freed(self) -> int:
        """Slots that an eviction frees in each sample."""
        return self.S - int(self.S * self.keep)


MODELS = (
    DecodeShape("gemma-3-12b", 1, 0, H=16, G=8, D=256, layers=48),
    DecodeShape("phi-3.5-v", 1, 0, H=32, G=32, D=96, layers=32),
    DecodeShape("qwen2.5-vl-7b", 1, 0, H=28, G=4, D=128, layers=28),
)
LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768}
SINGLES = tuple(replace(model, name=f"{model.name}-{label}", S=S) for label, S in LENGTHS.items() for model in MODELS)
BATCH = replace(SINGLES[0], name=f"{SINGLES[0].name}-b8", B=8)
SMOKE = (
    DecodeShape("edge", 1, 1, H=1, G=1, D=16, layers=1),
    DecodeShape("odd", 2, 37, H=6, G=2, D=70, layers=2),
)
FLEX = tuple(shape.name for shape in SINGLES[3:6]) + (
    SMOKE[1].name,
)  # compiled anew for each size: one length is enough


def decode_shapes_for(device: str, smoke: bool = False) -> tuple[DecodeShape, ...]:
    """The sizes measured on a device type. A CPU reads 32k slots no other way than 8k."""
    if smoke:
        return SMOKE
    return SINGLES[:6] if device == "cpu" else (*SINGLES, BATCH)
