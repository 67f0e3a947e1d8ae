"""The benchmarks of other methods' ops refuse wrong answers, and their byte model agrees with arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import tables
from bench.harness.results import load
from bench.measure import main, measure
from bench.ops.methods.cases import METHOD_CASES
from bench.ops.methods.floors import METHOD_OPS, method_traffic
from bench.ops.methods.shapes import SMOKE, MethodShape
from bench.ops.prefill.cases import Variant, WrongAnswer


def broken(output: torch.Tensor) -> torch.Tensor:
    """A right answer with one number wrong in it."""
    output = output.clone()
    last = output.view(-1)[-1:]
    last.copy_(~last if output.dtype == torch.bool else last + 1)
    return output


@pytest.mark.parametrize("op", METHOD_CASES)
def test_one_wrong_number_aborts_the_case(op):
    case = METHOD_CASES[op](SMOKE[1], torch.float32, "cpu")
    for name, right in list(case.variants.items()):

        def wrong(*inputs: Any, right: Variant = right) -> torch.Tensor:
            return broken(right.function(*inputs))

        case.variants[name] = Variant(wrong, tolerance=right.tolerance)
        with pytest.raises(WrongAnswer, match=name):
            measure(case, "cpu", seconds=0.0)
        case.variants.pop(name)


def test_smoke_run_measures_every_op_and_prints_tables(tmp_path):
    file = tmp_path / "day.json"
    assert main(["--device", "cpu", "--file", str(file), "--phase", "methods", "--smoke", "--threads", "1"]) == 0
    content = load(file)
    assert {key.split("/")[0] for key in content["cases"]} == set(METHOD_OPS) == set(METHOD_CASES)
    for case in content["cases"].values():
        assert not [name for name, variant in case["variants"].items() if "failed" in variant]
    assert "| attention_column_sums: size | dtype | ours | eager |" in tables.blocks(content)


def test_bytes_of_a_tiny_choice_are_those_counted_by_hand():
    shape = MethodShape("tiny", B=2, N=20, K=4, width=8, H=4, G=2, D=16)
    sums = method_traffic("attention_column_sums", shape, 2)
    assert sums.minimal == 2 * (20 * 6 * 16 * 2 + 20 * 8) + 2 * 2 * 20 * 4
    farthest = method_traffic("farthest_points", shape, 4)
    assert (farthest.read, farthest.reread, farthest.launches) == (2 * 400 * 4, 2 * 4 * 20 * 4, 2)
    dpp = method_traffic("dpp_map", shape, 4)
    assert (dpp.read, dpp.reread) == (2 * 5 * 20 * 4, 2 * (4 + 6) * 20 * 4)
    assert method_traffic("drop_similar", shape, 4).reread == 2 * (10 * 10 + 6 * 6) * 4  # 20 left, then 12
    with pytest.raises(ValueError, match="got 'attend'"):
        method_traffic("attend", shape, 2)
