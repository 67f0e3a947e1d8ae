"""Three launches for a profiler: `prune_sequence` at Phi's size, two, and one decode step with scores of 8192 slots."""

from __future__ import annotations

import torch

from bench.ops.decode.cases import DECODE_CASES
from bench.ops.decode.shapes import SINGLES as DECODE
from bench.ops.prefill.cases import CASES, Case
from bench.ops.prefill.shapes import FIRST


def calls() -> list[tuple[Case, str]]:
    """Cases and their variants."""
    attention = DECODE_CASES["attend_scores"](DECODE[3], torch.bfloat16, "cuda")
    return [(CASES["prune_sequence"](FIRST, torch.bfloat16, "cuda"), "ours static"), (attention, "ours")]


def main() -> None:
    for case, variant in calls():
        inputs = case.make(torch.Generator("cuda").manual_seed(0))
        case.variants[variant].function(*inputs)
        torch.cuda.synchronize()
    print("three kernels were launched", flush=True)


if __name__ == "__main__":
    main()
