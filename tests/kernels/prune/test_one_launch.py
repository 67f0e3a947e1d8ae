"""prune_sequence in one launch: the same bits as in two, every piece of work once, no copy before its ranking."""

from __future__ import annotations

import pytest
import torch
from sequences import BUDGETS, sequence

from asymvlm_kernels import PrunedSequence, prune_sequence, use_backend
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.prefill.prune import scratch, two_launches
from asymvlm_kernels.testing import DTYPES
from asymvlm_kernels.tuning.prune import RankConfig
from asymvlm_kernels.unproven import one_launch, paths
from asymvlm_kernels.unproven.paths import PrefillPath, use_path


def run(case, budget, launches: int, **options) -> PrunedSequence:
    inputs = (case.embeds, case.vision_mask, case.text_mask, case.weight, budget)
    with use_backend("triton"), use_path(PrefillPath(launches)):
        return prune_sequence(*inputs, protect=case.protect, static=True, **options)


def assert_same(one: PrunedSequence, two: PrunedSequence) -> None:
    for name in ("embeds", "index", "lengths", "counts", "scores", "gap"):
        got, want = getattr(one, name), getattr(two, name)
        assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
    for name, want in two.carry.items():
        assert torch.equal(one.carry[name], want), name


@pytest.mark.parametrize(
    "B,S,D,padding_side,dtype",
    [
        (1, 1, 1, "left", DTYPES[0]),
        *((2, 80, 70, "right", dtype) for dtype in DTYPES),
        (1, 140, 136, "left", DTYPES[2]),
    ],
)
def test_equals_two_launches(B, S, D, padding_side, dtype, device):
    case = sequence(B, S, D, dtype, exact=False, device=device)
    ids = torch.arange(B * S, device=device).view(B, S)
    carry = {"ids": ids, "positions": ids.expand(3, B, S), "flags": ids % 3 == 1}
    capacity = S // 2 + 1
    options = {"padding_side": padding_side, "capacity": capacity, "carry": carry, "carry_pad": {"ids": -1}}
    assert_same(run(case, BUDGETS[2], 1, **options), run(case, BUDGETS[2], 2, **options))


def test_many_small_samples_take_turns(device, monkeypatch):
    monkeypatch.setattr(one_launch, "PROGRAMS_AHEAD", 5)  # two samples ahead, not all
    case = sequence(5, 70, 8, device=device)
    case.text_mask[3] = case.vision_mask[4] = False
    assert_same(run(case, BUDGETS[3], 1), run(case, BUDGETS[3], 2))
    assert "tickets" in {use for *_, use in scratch._counters}
    assert not any(counters.any() for counters in scratch._counters.values())


def test_long_rows_and_no_samples(device, monkeypatch):
    monkeypatch.setattr(two_launches, "rank_config", lambda S: RankConfig(128, chunked=True))
    case = sequence(2, 300, 8, device=device)
    assert_same(run(case, BUDGETS[2], 1), run(case, BUDGETS[2], 2))
    for B, S in ((0, 5), (2, 0)):
        empty = sequence(B, S, 4, device=device)
        assert_same(run(empty, BUDGETS[0], 1), run(empty, BUDGETS[0], 2))


@triton.jit
def _tickets_kernel(tickets_ptr, work_ptr, B, pieces, items, ahead):
    scores, sample, piece = one_launch.take_ticket(tickets_ptr, B, pieces, items, ahead)
    row = work_ptr + tl.program_id(0) * 3
    tl.store(row, scores.to(tl.int64))
    tl.store(row + 1, sample)
    tl.store(row + 2, piece.to(tl.int64))


@pytest.mark.parametrize("B,pieces,items,ahead", [(1, 3, 2, 1), (4, 3, 2, 1), (5, 2, 7, 3), (3, 1, 1, 3)])
def test_every_piece_of_work_once_and_copies_after_their_sample(B, pieces, items, ahead, device):
    programs = B * (pieces + items)
    work = torch.empty((programs, 3), dtype=torch.int64, device=device)
    tickets = torch.zeros(1, dtype=torch.int32, device=device)
    _tickets_kernel[(programs,)](tickets, work, B, pieces, items, ahead)
    order = [tuple(row) for row in work.tolist()]
    scoring = [(1, b, piece) for b in range(B) for piece in range(pieces)]
    assert sorted(order) == sorted(scoring + [(0, b, item) for b in range(B) for item in range(items)])
    if device.type == "cpu":  # programs run in turn, so row and ticket agree
        scored = [max(order.index((1, b, piece)) for piece in range(pieces)) for b in range(B)]
        first_copy = [min(order.index((0, b, item)) for item in range(items)) for b in range(B)]
        assert all(copy > rank for copy, rank in zip(first_copy, scored, strict=True))
        assert first_copy == sorted(first_copy)


def test_one_launch_is_one_launch(device, monkeypatch):
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    for module in (two_launches, one_launch):
        for name in ("_score_select_kernel", "_gather_sequence_kernel", "_prune_static_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    run(sequence(2, 40, 8, device=device), BUDGETS[0], 1)
    assert len(launched) == 1
    run(sequence(2, 40, 8, device=device), BUDGETS[0], 2)
    assert len(launched) == 3


@pytest.mark.parametrize("path", [PrefillPath(), PrefillPath(overlap=True), PrefillPath(1, overlap=True)], ids=str)
def test_what_is_not_asked_for_stays(path, device):
    names = set(paths.launchers_of(path))
    assert names <= {"score_select", "gather_sequence", "prune_static"}
    case = sequence(2, 40, 8, device=device)
    scores = torch.zeros(2, 40, device=device)
    masks = (case.embeds, case.vision_mask, case.text_mask)
    with use_backend("triton"), use_path(path):  # no overlap on a CPU; given scores and no slot take two launches
        for options in ({"static": True, "scores": scores}, {"scores": scores}, {"static": True, "capacity": 0}, {}):
            with use_backend("reference"):
                expected = prune_sequence(*masks, **options)
            assert_same(prune_sequence(*masks, **options), expected)


def test_a_path_is_one_that_there_is(monkeypatch):
    with pytest.raises(ValueError, match="launches must be 1 or 2, got 3"):
        PrefillPath(3)
    assert not paths.can_overlap(torch.device("cpu"))
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert paths.can_overlap(torch.device("cuda", 0)) == (capability == (9, 0))
