"""A benchmark that accepts a wrong answer, or that measures one cached input, is worth nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import results
from bench.harness.timing import interleave, set_count
from bench.measure import choose, main, make_sets, measure
from bench.ops.prefill.cases import CASES, Case, Variant, WrongAnswer, prepare
from bench.ops.prefill.shapes import SMOKE

SHAPE = SMOKE[1]


def case_without_compile(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return choose(prepare(op, SHAPE, dtype, "cpu"), "without")


def broken(op: str, output: Any) -> Any:
    """A right answer with one thing wrong in it."""
    if op == "prune_sequence":
        rows, index = output
        return rows, index.roll(1, dims=1)
    output = output.clone()
    output.view(-1)[-1] = output.view(-1)[-1] + 1
    return output


@pytest.mark.parametrize("op", CASES)
def test_one_wrong_element_aborts_the_case(op: str):
    case = case_without_compile(op)
    right = case.variants["ours"].function
    case.variants["ours"] = Variant(lambda *inputs: broken(op, right(*inputs)))
    with pytest.raises(WrongAnswer, match="ours"):
        measure(case, "cpu", seconds=0.0)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_an_unwritten_score_aborts_the_case(value: float):
    case = case_without_compile("score_tokens")
    case.variants["ours"] = Variant(lambda v, t, w: torch.full(v.shape[:2], value))
    with pytest.raises(WrongAnswer, match="error"):
        measure(case, "cpu", seconds=0.0)


def test_pruning_that_keeps_worse_tokens_aborts_the_case():
    case = case_without_compile("prune_sequence")

    def first_tokens(embeds: torch.Tensor, vision: torch.Tensor, text: torch.Tensor, weight: torch.Tensor) -> Any:
        keep = text | (vision & (vision.cumsum(-1) <= SHAPE.K))
        index = keep.nonzero()[:, 1].view(SHAPE.B, -1)
        return embeds[keep].view(SHAPE.B, -1, SHAPE.D), index

    case.variants["ours"] = Variant(first_tokens)
    with pytest.raises(WrongAnswer, match="best vision tokens"):
        measure(case, "cpu", seconds=0.0)


@pytest.mark.parametrize("op", CASES)
def test_every_variant_is_timed_in_both_rounds(op: str):
    case = case_without_compile(op, torch.bfloat16)
    record = measure(case, "cpu", seconds=0.0)
    assert list(record["variants"]) == list(case.variants)
    for variant in record["variants"].values():
        assert len(variant["wall_us"]["rounds"]) == 2
        assert variant["wall_us"]["median"] > 0


def test_a_peer_that_breaks_is_named_and_the_others_are_timed():
    def unsupported(*inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not on this machine")

    case = case_without_compile("gather_rows")
    case.variants["indexing"] = Variant(unsupported)
    record = measure(case, "cpu", seconds=0.0)
    assert record["variants"]["indexing"] == {"failed": "NotImplementedError: not on this machine"}
    assert record["variants"]["ours"]["wall_us"]["calls"] > 0


def test_compiled_peers_can_be_left_to_a_run_of_their_own():
    score, gather = (prepare(op, SHAPE, torch.float32, "cpu") for op in ("score_tokens", "gather_rows"))
    assert list(choose(score, "with").variants) == list(choose(score, "only").variants) == list(score.variants)
    assert set(score.variants) - set(choose(score, "without").variants) == {"literal compiled", "folded compiled"}
    assert choose(gather, "only").variants == {}


def test_variants_take_turns():
    order: list[str] = []

    def logged(name: str) -> list[float]:
        order.append(name)
        return [1.0]

    interleave({name: {"us": lambda name=name: logged(name)} for name in "AB"})  # type: ignore[misc]
    assert order == ["A", "B", "A", "B"]


def test_input_sets_differ_and_fill_four_caches():
    sets = make_sets(prepare("score_tokens", SHAPE, torch.float32, "cpu"), "cpu")
    assert not torch.equal(sets[0][0], sets[1][0])
    assert set_count(set_bytes=15, cache=50, memory=10**6) == 14  # 14 * 15 >= 4 * 50 > 13 * 15
    assert set_count(set_bytes=1000, cache=50, memory=10**6) == 2
    assert set_count(set_bytes=15, cache=50, memory=240) == 4  # no more than a quarter of memory


def test_resume_measures_only_what_is_missing(tmp_path, capsys):
    file = tmp_path / "day.json"
    args = ["--device", "cpu", "--smoke", "--file", str(file), "--op", "select_tokens"]
    assert main([*args, "--shape", "edge"]) == 0
    first = results.load(file)["cases"]
    assert main([*args, "--resume"]) == 0
    content = results.load(file)
    assert [key.split("@")[0] for key in content["cases"]] == [
        "select_tokens/edge/float32",
        "select_tokens/odd/float32",
    ]
    assert content["cases"].items() >= first.items()
    assert len(content["runs"]) == 2
    assert "measured already" in capsys.readouterr().out
