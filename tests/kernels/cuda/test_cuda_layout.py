"""The index arithmetic of csrc/prune.cu, written once more in numpy: fragments, banks, the split of the work, slots.

The emulator runs the kernels, but with a matrix product of our own; here its layout is held against the tables of the
PTX manual. Plans are the library's own, for the sizes of real devices and models.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from cuda_library import Emulated, emulated

from asymvlm_kernels.prefill import reference
from asymvlm_kernels.testing import SHAPES
from asymvlm_kernels.unproven.cuda import library as cuda

GROUP, STEP, WARPS, TEXT = 16, 32, 8, 32
BINS, CANDIDATES = 2048, 512
DEVICES = {  # processors, shared memory of a block, clusters, bulk copies
    "A100": Emulated(108, 163 << 10, clusters=False, bulk=False),
    "L40S": Emulated(142, 99 << 10, clusters=False, bulk=False),
    "H100": Emulated(132, 227 << 10),
    "B200": Emulated(148, 227 << 10),
    "RTX 5090": Emulated(170, 99 << 10, clusters=False),
}


def operand_places(lane: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """PTX, "Matrix Fragments for mma.m16n8k16", 16-bit types: (row, column) of a lane's elements of A, B and C."""
    group, in_group = lane >> 2, lane % 4
    a = [(group if i < 2 or 4 <= i < 6 else group + 8, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)]
    b = [(in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(4)]
    c = [(group if i < 2 else group + 8, in_group * 2 + (i & 1)) for i in range(4)]
    return a, b, c


def products(rows: np.ndarray, text: np.ndarray) -> np.ndarray:
    """``rows (16, 32) @ text (32, 32).T`` by the loads of product.cuh and the tables above."""
    result = np.full((GROUP, TEXT), np.nan)
    for n in range(4):
        sums = np.zeros((16, 8))
        for half in range(2):  # the two products of a step: elements 0 to 3 of each lane's 8, then 4 to 7
            a, b = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
            for lane in range(32):
                g, c = lane // 4, lane % 4
                x, y = rows[g, 8 * c : 8 * c + 8], rows[g + 8, 8 * c : 8 * c + 8]
                t = text[n * 8 + g, 8 * c : 8 * c + 8]
                words = (0, 1) if half == 0 else (2, 3)  # pairs of elements
                loaded_a = [
                    *x[2 * words[0] :][:2],
                    *y[2 * words[0] :][:2],
                    *x[2 * words[1] :][:2],
                    *y[2 * words[1] :][:2],
                ]
                loaded_b = [*t[2 * words[0] :][:2], *t[2 * words[1] :][:2]]
                places_a, places_b, _ = operand_places(lane)
                for place, value in zip(places_a, loaded_a, strict=True):
                    a[place] = value
                for place, value in zip(places_b, loaded_b, strict=True):
                    b[place] = value
            sums += a @ b
        for lane in range(32):
            g, c = lane // 4, lane % 4
            for (row, column), i in zip(operand_places(lane)[2], range(4), strict=True):
                assert (row, n * 8 + column) == (g + 8 * (i >= 2), n * 8 + 2 * c + i % 2)  # where multiply() writes it
                result[row, n * 8 + column] = sums[row, column]
    return result


def test_fragments_multiply_rows_with_text():
    generator = np.random.default_rng(0)
    rows, text = generator.integers(-9, 9, (16, 32)), generator.integers(-9, 9, (32, 32))
    assert np.array_equal(products(rows.astype(float), text.astype(float)), rows @ text.T)


def row_bytes(slice_: int, itemsize: int) -> int:
    return -(-slice_ * itemsize // 128) * 128 + 64


@pytest.mark.parametrize("itemsize", [2, 4])
def test_fragment_loads_have_no_bank_conflict(itemsize):
    for slice_ in range(32, 1025, 32):
        stride = row_bytes(slice_, itemsize)
        assert stride % 16 == 0
        for phase in range(4 if itemsize == 2 else 0):  # 16 bytes a lane: 8 lanes at a time
            lanes = range(8 * phase, 8 * phase + 8)
            words = [(lane // 4 * stride + lane % 4 * 16) // 4 + i for lane in lanes for i in range(4)]
            assert len({word % 32 for word in words}) == 32


def plan_of(B: int, S: int, D: int, dtype: int = 2) -> cuda.Plan:
    call, plan = cuda.Prune(), cuda.Plan()
    call.B, call.S, call.D, call.capacity, call.dtype = B, S, D, S, dtype
    call.embeds_d, call.embeds_s, call.embeds_b = 1, D, S * D
    assert cuda.library().asymvlm_prune_plan(ctypes.byref(call), ctypes.byref(plan)) == 0
    return plan


def own_items(plan: cuda.Plan, B: int, team: int) -> list[tuple[int, int, int]]:
    """Sample, first row and rows of each item of a team, as prune.cu counts them."""
    numbers = range(team, B * plan.items, plan.teams)
    rows = plan.groups * GROUP
    return [(number // plan.items, number % plan.items * rows, rows) for number in numbers]


@pytest.mark.usefixtures("cuda_library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of devices that are not here")
@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("dtype", [0, 2], ids=["fp32", "bf16"])
def test_every_row_and_column_has_one_owner(device_name, dtype):
    kind = DEVICES[device_name]
    sizes = [(B, shape.N + shape.L, shape.D) for shape in SHAPES for B in (1, 3, 8, 64)]
    sizes += [(1, 1, 1), (2, 17, 70), (1, 65536, 8), (1, 300, 1024), (1, 300, 1025), (300, 20, 8192), (1, 2530, 5120)]
    with emulated(kind):
        for B, S, D in sizes:
            plan = plan_of(B, S, D, dtype)
            assert plan.team * plan.teams <= plan.resident <= kind.processors
            assert plan.shared <= kind.shared
            columns = np.zeros(D, dtype=int)
            for rank in range(plan.team):
                width = min(plan.slice, D - rank * plan.slice)
                assert 0 < width <= 1024
                columns[rank * plan.slice :][:width] += 1
            assert (columns == 1).all()
            assert plan.team == plan_of(1, 16, D, dtype).team  # or a score would depend on the batch
            assert plan.slice == plan_of(1, 16, D, dtype).slice
            rows = np.zeros((B, S), dtype=int)
            for team in range(plan.teams):
                for sample, first, count in own_items(plan, B, team):
                    rows[sample, first : first + count] += 1
            assert (rows == 1).all()


@pytest.mark.usefixtures("cuda_library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of devices that are not here")
@pytest.mark.parametrize(
    "device_name,held",
    [("H100", ("5/5", "1/1", "3/3", "5/6", "6/8", "4/32")), ("A100", ("5/6", "1/1", "4/4", "4/7", "4/10", "4/39"))],
)
def test_groups_of_v_that_stay_in_shared_memory(device_name, held):
    # all of Phi-3.5-V on an H100: rows are read once; the others' first groups are read again, from L2 where they fit
    with emulated(DEVICES[device_name]):
        plans = [plan_of(1, shape.N + shape.L, shape.D) for shape in SHAPES]
    assert tuple(f"{plan.ring}/{plan.groups}" for plan in plans) == held


@pytest.mark.usefixtures("cuda_library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="plans of devices that are not here")
@pytest.mark.parametrize("processors", [1, 5, 33])
def test_slots_of_the_items_are_the_selection(processors):
    torch.manual_seed(0)
    B, S = 2, 700
    scores = torch.randn(B, S).mul(4).round()  # ties across the edges of items
    mask = torch.rand(B, S) < 0.8
    lengths = torch.tensor([311, 20])
    keys = reference.order_key(scores, mask)
    with emulated(Emulated(processors)):
        plan = plan_of(B, S, 64)
    found = torch.full((B, S), -1)
    for team in range(plan.teams):
        for b, first, rows in own_items(plan, B, team):
            kth = keys[b].sort(descending=True).values[lengths[b] - 1]
            better, equal = keys[b] > kth, keys[b] == kth
            wanted = int(lengths[b] - better.sum())
            for place in range(first, min(first + rows, S)):  # what move_item counts before its rows, and in them
                equal_before = int(equal[:place].sum())
                if better[place] or (equal[place] and equal_before < wanted):
                    found[b, int(better[:place].sum()) + min(equal_before, wanted)] = place
    assert torch.equal(found, reference.select_tokens(scores, lengths, mask, S))


def bins_of(scores: np.ndarray) -> np.ndarray:
    """rank.cuh's quantisation of finite scores, in fp32."""
    low = np.float32(0.5) * scores.min()
    width = np.float32(0.5) * scores.max() - low
    with np.errstate(over="ignore"):
        scale = min(np.float32(BINS - 1) / width, np.finfo(np.float32).max) if width > 0 else np.float32(0)
    return np.clip((np.float32(0.5) * scores - low) * np.float32(scale), 0, BINS - 1).astype(int)


@pytest.mark.parametrize("N", [256, 2500, 16384, 65536])
@pytest.mark.parametrize("kind", ["normal", "skewed", "bf16", "outlier", "tiny", "huge"])
def test_the_bin_of_a_rank_holds_few_scores(N, kind):
    generator = np.random.default_rng(N)
    scores = generator.normal(0.15, 0.1, N).astype(np.float32)
    if kind == "skewed":
        scores = generator.gamma(1.2, 0.05, N).astype(np.float32)
    elif kind == "bf16":
        scores = torch.from_numpy(scores).bfloat16().float().numpy()
    elif kind == "outlier":
        scores[0] = 3
    elif kind in ("tiny", "huge"):
        scores = scores * np.float32(1e-38 if kind == "tiny" else 3e38)
        scores = scores[np.isfinite(scores)]
    bins = bins_of(scores)
    order = np.argsort(-scores, kind="stable")
    assert (np.diff(bins[order]) <= 0).all()  # monotone, so the counts of bins find the bin of a rank
    ranks = [1, N // 4, N // 2, int(0.65 * N), len(scores)]
    most = max(int((bins == bins[order[rank - 1]]).sum()) for rank in ranks)
    if kind in ("normal", "skewed", "huge") or (kind in ("bf16", "outlier") and N <= 2500):
        assert most <= CANDIDATES  # else the digits are counted: exact too, and slower
