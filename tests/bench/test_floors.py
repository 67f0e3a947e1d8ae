"""The byte model against arithmetic done by hand."""

from __future__ import annotations

import pytest

from bench.ops.prefill.floors import (
    ASSUMED,
    OPS,
    Device,
    floor_us,
    measured_device,
    predicted_us,
    traffic,
    two_read_floor_us,
)
from bench.ops.prefill.shapes import BATCHES, SINGLES, SMOKE, Shape

BY_NAME = {shape.name: shape for shape in SINGLES + BATCHES}
ROUND = Device("round numbers", copy_gbs=1000.0, launch_us=3.0)  # 1 MB is 1 us


def test_bytes_of_a_tiny_problem_are_those_counted_by_hand():
    shape = Shape("tiny", B=2, N=10, D=8, L=3, keep=0.5)  # K = 5
    score = traffic("score_tokens", shape, itemsize=2, tile_rows=4)
    assert score.read == 2 * 10 * 8 * 2 + 2 * 3 * 8 * 2 + 8 * 4
    assert score.written == 2 * 10 * 4
    assert score.reread == 2 * (2 * (2 * 3 * 8 * 2))  # 3 tiles: two more reads of hi and lo
    select = traffic("select_tokens", shape, itemsize=2)
    assert (select.read, select.written, select.reread) == (2 * (10 * 4 + 4), 2 * 5 * 8, 0)
    gather = traffic("gather_rows", shape, itemsize=4)
    assert (gather.read, gather.written) == (2 * 5 * 8 * 4 + 2 * 5 * 8, 2 * 5 * 8 * 4)
    prune = traffic("prune_sequence", shape, itemsize=2, tile_rows=4)
    assert prune.written == 2 * (5 + 3) * 8 * 2
    assert prune.minimal == score.read + 2 * 2 * 13 + prune.written


@pytest.mark.parametrize(
    "name, two_read_us",
    [
        ("phi-3.5-v", 11.8),
        ("gemma-3-12b", 1.6),
        ("gemma-3-12b-4-images", 7.3),
        ("llava-next-8b", 18.2),
        ("qwen2.5-vl-7b-page", 22.6),
        ("qwen2.5-vl-7b-largest-image", 90.1),
    ],
)
def test_two_read_floor_on_an_h100_is_that_of_the_design(name: str, two_read_us: float):
    assert two_read_floor_us(BY_NAME[name], 2, ASSUMED["h100"]) == pytest.approx(two_read_us, abs=0.1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SINGLES + SMOKE, ids=lambda shape: shape.name)
def test_fp32_moves_more_than_bf16_and_a_prediction_is_above_its_floor(op: str, shape: Shape):
    assert traffic(op, shape, 4).minimal >= traffic(op, shape, 2).minimal
    assert predicted_us(op, shape, 2, ROUND) > floor_us(op, shape, 2, ROUND) > 0


def test_a_batch_costs_its_samples_but_for_the_shared_weight():
    one, eight = (traffic("score_tokens", BY_NAME[name], 2).minimal for name in ("phi-3.5-v", "phi-3.5-v-b8"))
    assert eight == 8 * one - 7 * 3072 * 4


def test_kept_rows_are_counted_in_exact_integers():
    assert Shape("", 1, 90, 8, 1, keep=0.7).K == 63  # a float floor gives 62
    assert BY_NAME["phi-3.5-v"].K == 1625


def test_a_run_replaces_the_assumed_machine():
    run = {"environment": {"device": "some GPU"}, "ceiling": {"copy_gbs": 500.0, "launch_us": 1.5}}
    assert measured_device(run) == Device("some GPU", 500.0, 1.5)
    assert "(model)" in ASSUMED["h100"].name


@pytest.mark.parametrize("name", ["phi-3.5-v", "phi-3.5-v-b8", "phi-3.5-v-b64"])
def test_what_a_call_reads_beside_v_stays_small(name: str):
    shape = BY_NAME[name]
    moved = traffic("prune_sequence", shape, 2)
    vision, kept = shape.B * shape.N * shape.D * 2, shape.B * (shape.K + shape.L) * shape.D * 2
    assert moved.minimal <= 1.02 * (vision + kept)  # from and to device memory: text, weight and masks are the rest
    assert vision + moved.reread - kept <= 1.6 * vision  # through L2 for the score, partial sums included


def test_unknown_op_is_refused_by_name():
    with pytest.raises(ValueError, match="got 'sort_tokens'"):
        traffic("sort_tokens", SMOKE[0], 2)
