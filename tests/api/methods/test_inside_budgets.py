"""How many tokens the methods inside the decoder keep: published numbers, averages over layers, and what is refused."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import uniform
from shared_models import build_once
from tiny import make_batch

import asymvlm
from asymvlm import VisionPruning
from asymvlm.methods import FastV, FastVMasked, PyramidDrop, SparseVLM, SparseVLM2, StageBudget, available_methods
from asymvlm_kernels import Spread, UniformBudget

TWO = StageBudget((1, 2), (9, 4))


@pytest.fixture
def llava():
    return copy.deepcopy(build_once("llava"))


def test_methods_compare_at_an_average_over_the_layers():
    for kind in (FastV, PyramidDrop, SparseVLM, SparseVLM2):
        for keep, layers in ((0.3, 28), (0.5, 32), (0.75, 4), (1.0, 40)):
            method = kind.for_average(keep, layers)
            assert kind is SparseVLM or abs(method.budget.average(layers, 5760) - keep) < 1e-3
    assert FastV.for_average(0.5, 32) == FastV(2, 14 / 30)
    assert PyramidDrop.for_average(15 / 32, 32).budget.tokens == pytest.approx((500_000, 250_000, 125_000), abs=1)
    model, inputs = tiny.build("llava", num_hidden_layers=4), make_batch("llava", "one_image_each")
    for kind in (FastV, FastVMasked, PyramidDrop, SparseVLM, SparseVLM2):
        method = kind.for_average(0.6, 4, *([16] if issubclass(kind, SparseVLM) else []))
        with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(method=method)) as handle:
            model(**inputs)
        wanted = 1.0 if kind is FastVMasked else 0.6
        assert handle.last.average_kept == pytest.approx([16 * wanted] * 3, abs=0.75)  # counts are whole numbers


def test_the_published_numbers():
    assert [SparseVLM.published(tokens).budget.tokens for tokens in (192, 128, 96, 64)] == [
        (300, 200, 110),
        (303, 110, 36),
        (238, 48, 26),
        (66, 30, 17),
    ]
    assert SparseVLM().budget.at(0, torch.tensor([576, 288, 1])).tolist() == [300, 150, 1]
    assert SparseVLM.published(64).budget.at(2, torch.tensor([576, 9])).tolist() == [17, 9]
    assert (FastV().layers, SparseVLM().layers, PyramidDrop().layers) == ((2,), (3, 7, 16), (8, 16, 24))
    assert {"fastv", "fastv masked", "sparsevlm", "sparsevlm v2", "pyramiddrop"} <= {*available_methods()}


def test_the_budget_of_the_setting_serves_fastv_and_no_method_that_has_its_own(llava):
    inputs = make_batch("llava", "one_image_each")
    with torch.no_grad(), asymvlm.patch(llava, vision=uniform(0.25, method="fastv")) as handle:
        llava(**inputs)
        assert handle.last.kept == [4, 4, 4]
        assert handle.last.keep_ratio == [0.25] * 3
    with torch.no_grad(), asymvlm.patch(llava, vision=VisionPruning(method=SparseVLM2(TWO))) as handle:
        llava(**inputs)
        assert handle.last.kept == [4, 4, 4]
        assert handle.last.keep_ratio == [0.25] * 3
    with pytest.raises(ValueError, match="decides itself how many tokens stay: pass no budget, got UniformBudget"):
        uniform(0.5, method=PyramidDrop())
    assert VisionPruning(budget=UniformBudget(1.0), method=PyramidDrop()).bypassed
    with pytest.raises(ValueError, match="spread is for methods before the decoder"):
        uniform(0.5, method=FastV(), spread=Spread())


def test_what_a_method_does_not_know_is_refused(llava):
    compact = VisionPruning(method=SparseVLM(TWO))
    inputs = make_batch("qwen2_5_vl", "single")
    with (
        asymvlm.patch(tiny.build("qwen2_5_vl"), vision=compact) as handle,
        pytest.raises(
            NotImplementedError, match="needs one position a token, without gaps, got positions of several axes"
        ),
    ):
        handle.model.generate(**inputs, max_new_tokens=1)
    with torch.no_grad(), asymvlm.patch(llava, vision=compact) as handle:
        with pytest.raises(ValueError, match=r"whose attention scores the images, and rows \[0\] have none"):
            llava(**make_batch("llava", "ends_in_image"))
        holed = make_batch("llava", "single")
        holed["attention_mask"][0, 2] = 0
        with pytest.raises(NotImplementedError, match="padding inside a row"):
            llava(**holed)
        llava.train()
        with pytest.raises(NotImplementedError, match=r"outside of training: call model.eval\(\)"):
            llava(**make_batch("llava", "single"))
        llava.eval()
    for wrong, told in (
        (lambda: StageBudget((2, 1), (3, 2)), "layers must ascend from 1"),
        (lambda: StageBudget((1, 2), (3, 4)), "tokens must descend"),
        (lambda: StageBudget((1,), (5,), 4), "at most the 4"),
        (lambda: StageBudget.shares((1,), (0.0,)), r"shares must be in \(0, 1\]"),
        (lambda: FastV(0, 0.5), "layers must ascend from 1"),
        (lambda: FastV.for_average(0.05, 32), r"keep must be in \(0.0625, 1\]"),
        (lambda: PyramidDrop.for_average(0.25, 32), r"keep must be in \(0.25, 1\]"),
        (lambda: PyramidDrop.for_average(0.5, 3), "a decoder of 4 layers or more, got 3"),
        (lambda: SparseVLM.published(100), "counts are published for 192, 128, 96, 64 tokens, got 100"),
    ):
        with pytest.raises(ValueError, match=told):
            wrong()
