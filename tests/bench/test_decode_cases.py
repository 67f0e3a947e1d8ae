"""The decode benchmarks refuse wrong answers, and their byte model agrees with arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import tables
from bench.harness.results import load
from bench.measure import main, measure
from bench.ops.decode.cases import DECODE_CASES
from bench.ops.decode.floors import DECODE_OPS, decode_traffic, parts, predicted_decode_us, scores_on_top
from bench.ops.decode.shapes import BATCH, SINGLES, SMOKE, DecodeShape
from bench.ops.prefill.cases import Variant, WrongAnswer
from bench.ops.prefill.floors import ASSUMED

BY_NAME = {shape.name: shape for shape in SINGLES}


def broken(output: Any, inputs: tuple[Any, ...]) -> Any:
    """A right answer with one number wrong in it."""
    if output == ():  # a move in place
        inputs[3][0, -1, int(inputs[1][0, 0]), 0] += 1
        return output
    tensors = [x.clone() for x in (output if isinstance(output, tuple) else (output,))]
    tensors[-1].view(-1)[-1] += 1
    return tuple(tensors) if isinstance(output, tuple) else tensors[0]


@pytest.mark.parametrize("variant", ["ours", "last"])
@pytest.mark.parametrize("op", DECODE_CASES)
def test_one_wrong_number_aborts_the_case(op, variant):
    case = DECODE_CASES[op](SMOKE[1], torch.float32, "cpu")
    name = list(case.variants)[-1] if variant == "last" else variant
    right = case.variants[name]
    wrong = Variant(lambda *inputs: broken(right.function(*inputs), inputs), tolerance=right.tolerance)
    case.variants[name] = wrong
    with pytest.raises(WrongAnswer, match=name):
        measure(case, "cpu", seconds=0.0)


def test_a_move_that_does_nothing_is_noticed_on_the_second_call():
    case = DECODE_CASES["move_slots"](SMOKE[1], torch.float32, "cpu")
    calls = []

    def lazy(*inputs: Any) -> tuple[()]:
        calls.append(inputs)
        return case_ours(*inputs) if len(calls) < 3 else ()

    case_ours = case.variants["ours"].function
    case.variants["ours"] = Variant(lazy)
    with pytest.raises(WrongAnswer, match="moved slots are wrong"):
        measure(case, "cpu", seconds=0.0)


def test_smoke_run_measures_every_op_and_prints_tables(tmp_path, capsys):
    file = tmp_path / "day.json"
    assert main(["--device", "cpu", "--file", str(file), "--phase", "decode", "--smoke", "--threads", "1"]) == 0
    content = load(file)
    assert {key.split("/")[0] for key in content["cases"]} == set(DECODE_OPS)
    for case in content["cases"].values():
        assert not [name for name, variant in case["variants"].items() if "failed" in variant]
    text = tables.blocks(content)
    assert "| attend_scores: size | dtype | ours | eager |" in text
    assert "score_tokens" not in text


def test_bytes_of_a_tiny_step_are_those_counted_by_hand():
    shape = DecodeShape("tiny", B=2, S=100, H=4, G=2, D=16, layers=3, keep=0.75)
    assert (shape.freed, parts(shape, 2)) == (25, 1)
    plain, scored = (decode_traffic(op, shape, 2) for op in ("attend", "attend_scores"))
    assert plain.read == 2 * (2 * 2 * 100 * 16 * 2) + 2 * 4 * 16 * 2
    assert plain.written == 2 * 4 * 16 * 2
    assert plain.reread == 2 * (2 * 4 * 1 * 17 * 4)  # written once, read once
    assert scored.minimal == plain.minimal + 2 * 100 * 4
    assert scored.reread == plain.reread + 2 * (2 * 4 * 100 * 4)
    moved = decode_traffic("move_slots", shape, 2)
    assert moved.written == 2 * 3 * (2 * 19) * 2 * 16 * 2  # 25 * 0.75 slots of each sample, in 2 * 3 tensors
    with pytest.raises(ValueError, match="got 'score_tokens'"):
        decode_traffic("score_tokens", shape, 2)


@pytest.mark.parametrize(
    "name,share", [("gemma-3-12b-32k", 0.016), ("phi-3.5-v-32k", 0.021), ("qwen2.5-vl-7b-32k", 0.109)]
)
def test_scores_add_what_the_design_counts(name, share):
    assert scores_on_top(BY_NAME[name], 2) == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("shape", [*SINGLES, BATCH], ids=lambda shape: shape.name)
def test_partial_outputs_stay_small_and_a_sample_fills_the_sms(shape):
    traffic = decode_traffic("attend", shape, 2)
    assert traffic.reread < (0.25 if shape.S < 30000 else 0.05) * traffic.read  # in L2 while the cache is short
    assert parts(shape, 2) * shape.G >= 128  # programs of one sample: about one an SM of an H100
    low, high = predicted_decode_us("attend", shape, 2, ASSUMED["h100"])
    assert low < high < 1.1 * low
