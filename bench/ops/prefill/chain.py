"""How long `prune_sequence` should take on an H100: a model of its longest chain of waiting. Nothing here is measured.

At B = 1 no processor is short of bytes; the time is a chain of latencies: one launch, the text's places, the steps of
the longest program, the arrivals, the search for a rank, the order, a second launch, the copy. Steps are counted from
the configuration that a call takes, the cost of a step from the machine code (Triton 3.9, sm_90, bf16).

    PYTHONPATH=. python -m bench.ops.prefill.chain
"""

from __future__ import annotations

from dataclasses import dataclass

from asymvlm_kernels.tuning.prefill import H100_PROCESSORS as PROCESSORS
from asymvlm_kernels.tuning.prune import rank_config, split_of
from bench.ops.prefill.floors import ASSUMED, floor_us, fused_config
from bench.ops.prefill.shapes import BATCHES, SINGLES, Shape

# Microseconds. A step of the product: 250 instructions in two warps a scheduler and 3 barriers at 1.75 GHz. A step of
# the search: 7.7 instructions a key of a thread and 60 more, in two warps a scheduler, and 2 barriers.
STEP = (2 * 250 + 3 * 55) / 1750
SEARCH_STEPS = 19  # of scores like cosines, with reductions before and behind
LAUNCH, TEXT, WAVE, ARRIVALS, ORDER, EDGE = 2.5, 0.7, 1.5, 3.5, 1.0, 1.5
THREADS = 256


@dataclass(frozen=True)
class Chain:
    """Microseconds (model) of the links of one call, and what its device memory needs at least."""

    product: float
    search: float
    copy: float
    bytes: float

    @property
    def total(self) -> float:
        links = LAUNCH + TEXT + self.product + ARRIVALS + self.search + ORDER + EDGE + self.copy
        return max(links, self.bytes)


def chain(shape: Shape) -> Chain:
    device, config = ASSUMED["h100"], fused_config(shape.D, 2)
    tiles, steps = shape.B * -(-shape.S // config.block_n), -(-shape.D // config.block_d)
    parts = split_of(tiles, shape.D, config, PROCESSORS).parts
    waves = -(-tiles * parts // PROCESSORS)
    longest = -(-shape.L // config.block_l) * -(-steps // parts)  # steps: blocks of text share the parts
    product = waves * longest * STEP + (waves - 1) * WAVE
    vision = shape.B * shape.N * shape.D * 2 / device.copy_gbs / 1e3
    search = SEARCH_STEPS * (2 * (7.7 * rank_config(shape.S).block_s / THREADS + 60) + 2 * 55) / 1750
    kept = shape.B * (shape.K + shape.L) * shape.D * 2 / device.copy_gbs / 1e3
    return Chain(max(product, vision), search, 1.5 * kept, floor_us("prune_sequence", shape, 2, device))


def table() -> str:
    lines = [
        "| size | floor | product | search | copy | `prune_sequence` predicted | times the floor | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SINGLES + BATCHES:
        one = chain(shape)
        numbers = (one.bytes, one.product, one.search, one.copy, one.total, one.total / one.bytes)
        name = f"{shape.name}: {shape.N} x {shape.D}, L = {shape.L}" + (f", B = {shape.B}" if shape.B > 1 else "")
        lines.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " | open |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
