"""The latency model of the CUDA library: what it adds to the bytes, and the predictions that are quoted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.ops.cuda import floors as cuda_floors
from bench.ops.prefill.floors import ASSUMED, Device, floor_us
from bench.ops.prefill.shapes import BATCHES, SINGLES, Shape

DECISIONS = (Path(__file__).parents[2] / "docs" / "decisions" / "kernels-cuda.md").read_text()
H100 = ASSUMED["h100"]
BY_NAME = {shape.name: shape for shape in SINGLES + BATCHES}


def test_a_tiny_problem_is_the_chain_alone():
    tiny, fast = Shape("tiny", B=1, N=16, D=8, L=1), Device("fast", copy_gbs=1e9, launch_us=0.0)
    assert cuda_floors.prune_us(tiny, 2, fast) == pytest.approx(6.5, abs=1e-3)
    assert cuda_floors.select_us(tiny, fast) == pytest.approx(1.2 + 2.4 + 0.5, abs=1e-3)


@pytest.mark.parametrize("shape", SINGLES, ids=lambda shape: shape.name)
def test_the_chain_does_not_grow_with_the_size_but_for_the_passes(shape):
    over = cuda_floors.prune_us(shape, 2, H100) - floor_us("prune_sequence", shape, 2, H100)
    assert over == pytest.approx(8.5, abs=0.2)


@pytest.mark.parametrize(
    "text,value",
    [
        (r"Phi-3.5-V, B = 1: ([\d.]+) us", cuda_floors.prune_us(BY_NAME["phi-3.5-v"], 2, H100)),
        (r"N = 256: ([\d.]+) us", cuda_floors.prune_us(BY_NAME["gemma-3-12b"], 2, H100)),
        (r"select of 2500: ([\d.]+) us", cuda_floors.select_us(BY_NAME["phi-3.5-v"], H100)),
    ],
)
def test_the_predictions_that_are_quoted_are_the_models(text, value):
    found = re.search(text, " ".join(DECISIONS.split()))
    assert found is not None
    assert float(found.group(1)) == round(value, 1)
