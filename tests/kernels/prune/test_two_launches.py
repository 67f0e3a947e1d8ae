"""prune_sequence on the two-launch path: equal to the reference, two launches, no synchronisation."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from sequences import BUDGETS, sequence
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from asymvlm_kernels import (
    AtLeastRelevant,
    PrunedSequence,
    RelativeThresholdBudget,
    Spread,
    UniformBudget,
    prune_sequence,
    use_backend,
)
from asymvlm_kernels.prefill.prune import given_scores, known_length, two_launches
from asymvlm_kernels.prefill.prune.tokens import Kept
from asymvlm_kernels.testing import DTYPES

LAUNCHERS = {
    "score_select": two_launches._score_select_triton,
    "gather_sequence": two_launches._gather_sequence_triton,
    "prune_static": known_length._prune_static_triton,
}
FREE = {"empty", "new_empty", "empty_like", "view", "split", "split_with_sizes", "permute", "as_strided"}


def assert_same(result: PrunedSequence, expected: PrunedSequence) -> None:
    for name in ("embeds", "index", "lengths", "counts", "scores", "gap"):
        got, want = getattr(result, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
    assert result.carry.keys() == expected.carry.keys()
    for name, want in expected.carry.items():
        assert torch.equal(result.carry[name], want), name


def both(case, budget, **options: Any) -> tuple[PrunedSequence, PrunedSequence]:
    inputs = (case.embeds, case.vision_mask, case.text_mask, case.weight, budget)
    with use_backend("triton"):
        result = prune_sequence(*inputs, protect=case.protect, **options)
    with use_backend("reference"):
        return result, prune_sequence(*inputs, protect=case.protect, **options)


def carried(B: int, S: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.arange(B * S, device=device).view(B, S)
    many = {f"more {number}": ids + number for number in range(8)}  # some go with the embeddings, the rest after
    return {"ids": ids, "positions": ids.expand(3, B, S), "wide": torch.randn(B, S, 70, device=device), **many}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_equals_the_reference(padding_side, static, dtype, device):
    case = sequence(2, 75, 40, dtype, device=device)
    pads = {"ids": -1, "wide": 0.5, "more 7": -100}
    options = {"padding_side": padding_side, "static": static, "carry": carried(2, 75, device), "carry_pad": pads}
    result, expected = both(case, BUDGETS[2], **options)
    assert_same(result, expected)
    assert result.embeds.shape[1] == (75 if static else result.lengths.max())


@pytest.mark.parametrize("capacity", [0, 20, 60, 90])
def test_capacity_cuts_and_pads(capacity, device):
    result, expected = both(sequence(2, 75, 8, device=device), UniformBudget(0.6), static=True, capacity=capacity)
    assert_same(result, expected)
    assert result.embeds.shape[1] == capacity
    assert ((result.index >= 0).sum(-1) == result.lengths).all()


def test_both_paths_of_the_reference_agree(device):
    # a budget that is not this package's goes step by step
    case = sequence(2, 40, 16, device=device)

    class Own(UniformBudget):
        pass

    for static in (False, True):
        for side in ("left", "right"):
            options = {"static": static, "padding_side": side, "carry": carried(2, 40, device)}
            (_, one), (_, other) = both(case, UniformBudget(0.3), **options), both(case, Own(0.3), **options)
            assert_same(one, other)
            assert_same(both(case, Own(0.3), **options)[0], one)


def test_capacity_is_checked(device):
    case = sequence(1, 10, 4, device=device)
    for wrong in ({"capacity": -1, "static": True}, {"capacity": 5}):
        with pytest.raises(ValueError, match="capacity"):
            both(case, UniformBudget(0.5), **wrong)


@pytest.mark.parametrize("B,S", [(0, 5), (2, 0)])
@pytest.mark.parametrize("static", [False, True])
def test_empty_axes(B, S, static, device):
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    for backend in ("triton", "reference"):
        with use_backend(backend):
            result = prune_sequence(torch.empty(B, S, 4, device=device), mask, mask, static=static)
        assert result.embeds.shape == (B, S if static else 0, 4)
        assert result.lengths.tolist() == [0] * B


class OnlyOurs(TorchDispatchMode):
    """Fails on every aten op that would launch a kernel or wait for one, inside our ops too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "asymvlm":
            with self:
                return LAUNCHERS[name](*args)
        result = func(*args, **(kwargs or {}))
        if name == "reshape" and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
            return result  # not a copy
        assert name in FREE, f"{func} in the middle of prune_sequence"
        return result


class Counted:
    """A kernel that counts its launches. What the interpreter does in one is its own affair."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("static", [True, False])
def test_two_launches_and_no_synchronisation(static, monkeypatch, device):
    monkeypatch.undo()  # poisoning is a launch
    case = sequence(2, 40, 16, device=device)
    ids = torch.arange(80, device=device).view(2, 40)
    options = {"carry": {"ids": ids, "positions": ids.expand(3, 2, 40)}, "static": static}
    inputs = (case.embeds, case.vision_mask, case.text_mask, case.weight, UniformBudget(0.5))
    with use_backend("triton"):
        prune_sequence(*inputs, **options)  # allocates the counters, which stay
        kernels = [Counted(two_launches._score_select_kernel), Counted(two_launches._gather_sequence_kernel)]
        monkeypatch.setattr(two_launches, "_score_select_kernel", kernels[0])
        monkeypatch.setattr(two_launches, "_gather_sequence_kernel", kernels[1])
        copies = []
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(tensor.shape) or tolist(tensor))
        with OnlyOurs():
            prune_sequence(*inputs, **options)
    assert [kernel.launches for kernel in kernels] == [1, 1]
    assert copies == ([] if static else [(2,)])


class Idle(Counted):
    """Counts launches that do nothing, but for lengths that a host may read."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            for kept in (arg for arg in args if isinstance(arg, Kept)):
                with _disable_current_modes():
                    kept.lengths.zero_()

        return launch


RULES: dict[str, dict[str, Any]] = {
    "spread": {"spread": Spread()},
    "threshold": {"budget": RelativeThresholdBudget(0.4)},
    "both": {"budget": RelativeThresholdBudget(0.4), "spread": Spread()},
    "both with a floor": {"budget": RelativeThresholdBudget(0.4), "spread": Spread(), "floor": AtLeastRelevant()},
}


@pytest.mark.parametrize("given", [False, True], ids=["scored", "given"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "trimmed"])
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_what_looks_at_all_scores_takes_the_same_two_launches(rule, static, given, monkeypatch, device):
    monkeypatch.undo()
    case = sequence(2, 40, 16, device=device)
    lines = torch.arange(40, device=device).expand(2, 40) // 7
    options = {"static": static, "lines": lines, "scores": torch.zeros(2, 40, device=device) if given else None, **rule}
    kernels = [Idle(two_launches._gather_sequence_kernel), Idle(two_launches._score_select_kernel)]
    kernels.append(Idle(given_scores._select_given_kernel))
    for module, kernel in zip((two_launches, two_launches, given_scores), kernels, strict=True):
        monkeypatch.setattr(module, kernel.kernel.fn.__name__, kernel)
    with use_backend("triton"):
        for mode in (contextlib.nullcontext(), OnlyOurs()):  # the first allocates the counters, which stay
            with mode:
                prune_sequence(case.embeds, case.vision_mask, case.text_mask, **options)
    found = [kernel.launches for kernel in kernels]
    assert found[1:] == ([0, 2] if given else [2, 0])
    assert found[0] == (2 if static else 0)  # none, where every row has no length


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ops_are_registered_well(backend, monkeypatch, device):
    monkeypatch.undo()  # opcheck compares the storage of a result with that of its fake
    case = sequence(2, 20, 8, device=device)
    ratios, numbers = two_launches.encode_budget(BUDGETS[2])  # type: ignore[misc]
    ids = torch.arange(40, device=device).view(2, 20)
    with use_backend(backend):
        *_, lengths, order, _ = two_launches.score_select(*vars(case).values(), ratios, numbers, 20)
        carry = ([ids, ids.expand(3, 2, 20)], [-1, 2.5], [False, True], 13, True)
        torch.library.opcheck(torch.ops.asymvlm.score_select, (*vars(case).values(), ratios, numbers, 20))
        torch.library.opcheck(torch.ops.asymvlm.gather_sequence, (case.embeds, order, lengths, *carry))
        torch.library.opcheck(torch.ops.asymvlm.prune_static, (*vars(case).values(), ratios, numbers, *carry))


def test_traces_without_a_graph_break(monkeypatch, device):
    monkeypatch.undo()
    case = sequence(2, 20, 8, device=device)
    ids = torch.arange(40, device=device).view(2, 20)

    def prune(embeds: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        masks = (case.vision_mask, case.text_mask, case.weight, UniformBudget(0.5))
        result = prune_sequence(embeds, *masks, carry={"ids": ids}, static=True)
        return result.embeds, result.carry["ids"], result.lengths

    with use_backend("reference"):
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(case.embeds, ids), prune(case.embeds, ids), strict=True):
            assert torch.equal(got, want)
