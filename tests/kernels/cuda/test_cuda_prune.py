"""The one-launch kernel of csrc/prune.cu equals the reference: on every kind of device, however the work is divided."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_library import AMPERE, HOPPER, KINDS, Emulated, emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sequences import BUDGETS, Sequence, assert_same, sequence

from asymvlm_kernels import BackendError, Budget, UniformBudget, prune_sequence, use_backend
from asymvlm_kernels.dispatch import Unsupported
from asymvlm_kernels.prefill.prune import known_length, scratch, two_launches
from asymvlm_kernels.testing import DTYPES, literal_scores
from asymvlm_kernels.unproven.cuda import library as cuda
from asymvlm_kernels.unproven.cuda import prefill

NAN, INF = float("nan"), float("inf")
HALVES = DTYPES[1:]
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
any_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
pytestmark = pytest.mark.usefixtures("cuda_library")


def select(case: Sequence, budget: Budget, capacity: int | None = None) -> two_launches.ScoreSelect:
    encoded = two_launches.encode_budget(budget)
    assert encoded is not None
    return prefill._score_select_cuda(*vars(case).values(), *encoded, capacity or case.embeds.shape[1])


def check(case: Sequence, budget: Budget, capacity: int | None = None) -> None:
    """Selection alone, then all in one launch, to either side, with numbers that move along."""
    most = case.embeds.shape[1] if capacity is None else capacity
    expected = case.score_select(budget, reference=True, capacity=most)
    if most:
        assert_same(select(case, budget, most), expected)
    B, S, _ = case.embeds.shape
    ids = torch.arange(B * S, device=case.embeds.device).view(B, S)
    carry = [
        ids,
        ids.expand(3, B, S),
        ids.bool(),
        (ids[..., None] * torch.tensor([1.0, 0.5], device=ids.device)).half(),
    ]
    encoded = two_launches.encode_budget(budget)
    assert encoded is not None
    for left in (True, False):
        rest = (carry, [-1, 5, True, 1.5], [False, True, False, False], most, left)
        result = prefill._prune_static_cuda(*vars(case).values(), *encoded, *rest)
        wanted = known_length._prune_static_reference(*vars(case).values(), *encoded, *rest)
        names = ("scores", "gap", "counts", "lengths", "out", "index")
        for name, got, want in zip(names, result, wanted, strict=False):
            assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
        for number, (got, want) in enumerate(zip(result[6], wanted[6], strict=True)):
            assert torch.equal(got, want), f"carry {number}"


@any_dtype
@any_kind
@pytest.mark.parametrize("B,S,D,text", [(1, 1, 1, 0.5), (2, 70, 70, 0.1), (1, 160, 264, 0.6), (1, 50, 1200, 0.2)])
def test_equals_the_reference_bit_for_bit(B, S, D, text, kind, dtype, device):
    with emulated(kind):
        check(sequence(B, S, D, dtype, text=text, device=device), BUDGETS[S % len(BUDGETS)])


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_budget(budget, device):
    check(sequence(3, 90, 16, seed=3, device=device), budget)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_masks_on_any_device(device, data):
    S = data.draw(st.integers(1, 150))
    shares = {name: data.draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])) for name in ("text", "protected", "padding")}
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    width = data.draw(st.sampled_from([1, 8, 40, 1030]))
    case = sequence(
        data.draw(st.integers(1, 3)), S, width, dtype, **shares, seed=data.draw(st.integers(0, 99)), device=device
    )
    if data.draw(st.booleans()):
        case.protect = None
    if data.draw(st.booleans()):
        case.weight = None
    kind = data.draw(st.sampled_from(list(KINDS.values())))
    made_up = Emulated(
        data.draw(st.integers(2, 7)), kind.shared, kind.clusters, kind.bulk, data.draw(st.integers(0, 5))
    )
    with emulated(made_up):
        check(case, data.draw(st.sampled_from(BUDGETS)), data.draw(st.sampled_from([S, S // 2, 0])))


@pytest.mark.parametrize("seed", [1, 2, 3])
@any_kind
def test_the_order_in_which_warps_run_changes_nothing(kind, seed, device):
    # teams of four; more than one block of text, so that partial sums are overwritten
    case = sequence(2, 90, 2100, torch.bfloat16, text=0.6, exact=False, device=device)
    with emulated(Emulated(8, kind.shared, kind.clusters, kind.bulk)):
        expected = select(case, BUDGETS[2])
    with emulated(Emulated(8, kind.shared, kind.clusters, kind.bulk, seed)):
        assert_same(select(case, BUDGETS[2]), expected)


def division(case: Sequence, **changes: int) -> cuda.Plan:
    """The library's own plan with some numbers replaced; scratch enough for any."""
    prefill._plans.clear()
    select(case, UniformBudget(0.5))
    plan = cuda.Plan.from_buffer_copy(*prefill._plans.values())
    for name, value in changes.items():
        setattr(plan, name, value)
    plan.workspace, plan.counters = 1 << 22, 1 << 10
    return plan


@pytest.mark.parametrize("changes", [{"ring": 1}, {"ring": 2}, {"teams": 1}, {"teams": 1, "ring": 2}], ids=str)
@pytest.mark.parametrize("keys_in_shared", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@any_kind
def test_any_division_of_the_work_gives_the_same(kind, dtype, keys_in_shared, changes, device):
    # few slots: rows are fetched again from memory; one team: it has the items of all samples
    case = sequence(3, 170, 72, dtype, exact=False, text=0.3, device=device)
    with emulated(kind):
        expected = select(case, BUDGETS[2])
        plan = division(case, keys_in_shared=keys_in_shared, **changes)
        results = [torch.empty_like(tensor) for tensor in expected[:5]]
        out, index = torch.empty(3, 120, 72, dtype=dtype), torch.empty(3, 120, dtype=torch.int64)
        encoded = two_launches.encode_budget(BUDGETS[2])
        assert encoded is not None
        tokens = tuple(vars(case).values())
        moved = (out.to(device), index.to(device))
        prefill.prune(tokens, (*results, None, None), *encoded, 170, plan=plan)
        assert_same(tuple(results), expected)
        prefill.prune(tokens, (*results[:4], None, *moved), *encoded, 120, left=True, plan=plan)
    short = case.score_select(BUDGETS[2], reference=True, capacity=120)  # whose scores differ in the last bits
    wanted = two_launches._gather_sequence_reference(case.embeds, short[4], short[3], [], [], [], 120, True)
    assert torch.equal(moved[0], wanted[0])
    assert torch.equal(moved[1], wanted[1])


@any_dtype
@pytest.mark.parametrize("kind", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_error_at_a_real_width_is_below_one_hundred_thousandth(kind, dtype, device):
    case = sequence(1, 64, 3072, dtype, protected=0, exact=False, device=device)
    rows = case.embeds[0]
    vision, texts = rows[case.vision_mask[0]][None], rows[(case.text_mask & ~case.vision_mask)[0]][None]
    exact = literal_scores(vision, texts, case.weight, torch.float64)[0]
    with emulated(Emulated(8, kind.shared, kind.clusters, kind.bulk)):
        scores = select(case, UniformBudget(0.5))[0][case.vision_mask]
    assert (scores.double() - exact).abs().max() < (1e-5 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e4])
def test_small_and_large_weights_keep_their_digits_in_fp16(scale, device):
    case = sequence(1, 60, 256, torch.float16, protected=0, exact=False, device=device)
    case.weight *= scale
    rows = case.embeds[0]
    vision, texts = rows[case.vision_mask[0]][None], rows[(case.text_mask & ~case.vision_mask)[0]][None]
    exact = literal_scores(vision, texts, case.weight, torch.float64)[0]
    scores = select(case, UniformBudget(0.5))[0][case.vision_mask]
    assert (scores.double() - exact).abs().max() < 1e-6 * scale


@any_dtype
def test_a_sample_scores_the_same_in_any_batch_on_any_number_of_processors(dtype, device):
    case = sequence(3, 70, 136, dtype, exact=False, device=device)
    together = select(case, UniformBudget(0.5))
    for row, processors in enumerate((1, 2, 9)):
        parts = [None if part is None else part[row : row + 1] for part in list(vars(case).values())[:4]]
        with emulated(Emulated(processors, 60 << 10)):
            alone = select(Sequence(*parts, case.weight), UniformBudget(0.5))
        assert alone[-1] == together[-1] == [], "nothing spreads"
        names = ("scores", "gap", "counts", "lengths", "order")
        for name, one, all_ in zip(names, alone[:-1], together[:-1], strict=True):
            assert torch.equal(one[0], all_[row]), name


@any_dtype
def test_special_values_rank_as_the_reference(dtype, device):
    case = sequence(1, 90, 64, dtype, text=0.05, protected=0, device=device)
    prunable = case.vision_mask[0].nonzero()[:, 0]
    case.embeds[0, prunable[0]] = 0
    case.embeds[0, prunable[1], 3] = NAN
    case.embeds[0, prunable[2], 5] = INF
    for ratio in (0.02, 0.5, 0.999):
        assert_same(select(case, UniformBudget(ratio)), case.score_select(UniformBudget(ratio), reference=True))
    case.embeds[0, (case.text_mask & ~case.vision_mask)[0].nonzero()[0, 0], 1] = NAN
    assert_same(select(case, UniformBudget(0.5)), case.score_select(UniformBudget(0.5), reference=True))


def test_rows_without_text_or_vision(device):
    case = sequence(4, 80, 8, device=device)
    case.text_mask[0] = False
    case.vision_mask[1] = False
    case.text_mask[2] = case.vision_mask[2] = case.protect[2] = False  # all padding
    case.protect[3] = True  # nothing to prune
    check(case, UniformBudget(0.25))
    case.protect = case.weight = None
    check(case, UniformBudget(0.25))


def test_no_text_token_is_lost_where_they_are_listed_in_windows(device):
    case = sequence(1, 700, 8, torch.bfloat16, text=0.85, padding=0, protected=0, device=device)
    texts = [row.nonzero()[:, 0] for row in case.text_mask & ~case.vision_mask]
    assert min(map(len, texts)) > 544  # a window of 512, and more than a block of 32 behind it
    check(case, UniformBudget(0.5))
    case.embeds.zero_()
    for b, places in enumerate(texts):  # six text tokens along an axis each, the others zero
        told = places[[0, 31, 32, 511, 512, len(places) - 1]]
        case.embeds[b, told, range(6)] = 1
        vision = (case.vision_mask[b] & ~case.protect[b]).nonzero()[:, 0]
        case.embeds[b, vision, torch.arange(len(vision), device=device) % 6] = 1
    scores = select(case, UniformBudget(0.5))[0]
    assert bool((scores[case.vision_mask & ~case.protect] >= 0.5).all())  # the weights are 0.5, 1 and 2


@pytest.mark.parametrize("capacity", [0, 3, 20, 60, 90])
def test_capacity_cuts_and_pads(capacity, device):
    check(sequence(2, 75, 8, protected=0.2, device=device), UniformBudget(0.6), capacity)


@pytest.mark.parametrize("B,S,D", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("capacity", [0, 7])
def test_empty_axes(capacity, B, S, D, cuda_backend, device):
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    mask[..., :3] = True
    ids = torch.arange(B * S, device=device).view(B, S)
    arguments = (torch.zeros(B, S, D, device=device), mask, ~mask)
    options = {"static": True, "capacity": capacity, "carry": {"ids": ids}, "carry_pad": {"ids": -7}}
    result = prune_sequence(*arguments, **options)
    with use_backend("reference"):
        wanted = prune_sequence(*arguments, **options)
    for name in ("embeds", "index", "lengths", "counts"):
        assert torch.equal(getattr(result, name), getattr(wanted, name)), name
    assert torch.equal(result.carry["ids"], wanted.carry["ids"])


@any_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_inputs_need_no_copy(dtype, kind, device):
    case = sequence(2, 50, 48, dtype, device=device)
    for name in ("embeds", "vision_mask", "text_mask", "protect", "weight"):
        tensor = getattr(case, name)
        wide = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype, device=device)
        setattr(case, name, wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor))
    with emulated(kind):
        check(case, UniformBudget(0.5))


def test_long_sequences_and_their_ties(device):
    case = sequence(1, 12000, 4, torch.bfloat16, text=0.001, seed=5, device=device)  # thousands of equal scores
    with emulated(Emulated(3, 50 << 10)):  # the keys do not fit in shared memory
        check(case, BUDGETS[2])


def test_counters_are_left_zero(device):
    with emulated(AMPERE):
        select(sequence(2, 90, 1200, torch.bfloat16, device=device), UniformBudget(0.5))
    assert scratch._counters
    assert all(not counters.any() for counters in scratch._counters.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted in the emulator")
@any_kind
def test_rows_are_read_once_and_leave_from_shared_memory(kind):
    case = sequence(1, 90, 64, torch.bfloat16, text=0.5)  # two blocks of text
    library = cuda.library()
    library.asymvlm_bytes_copied.restype = ctypes.c_int64
    with emulated(kind):
        plan = division(case)
        assert plan.ring >= plan.groups
        with use_backend("cuda"):
            arguments = (case.embeds, case.vision_mask, case.text_mask, case.weight, UniformBudget(0.5))
            result = prune_sequence(*arguments, protect=case.protect, static=True)
    assert library.asymvlm_bytes_copied(1) == 90 * 64 * 2
    assert library.asymvlm_bytes_copied(0) == (int(result.lengths) * 64 * 2 if kind.bulk else 0)


def test_more_blocks_than_fit_are_refused(device):
    blocks = division(sequence(1, 16, 16, torch.bfloat16, device=device)).resident + 1
    case = sequence(1, 16 * blocks, 16, torch.bfloat16, device=device)
    plan = division(case, teams=blocks, items=blocks, groups=1, ring=1)
    results = [torch.empty_like(tensor) for tensor in select(case, UniformBudget(0.5))[:5]]
    arguments = (tuple(vars(case).values()), (*results, None, None), [500_000] * 3, [0.0, 0.0], 16 * blocks)
    with pytest.raises(Unsupported, match="720, too many blocks in cooperative launch"):
        prefill.prune(*arguments, plan=plan)


@pytest.mark.parametrize(
    "changes",
    [
        *({"ring": 0}, {"ring": 65}, {"ring": 40}, {"slice": 31}, {"slice": 0}, {"team": 2}, {"groups": 1, "items": 1}),
        *({"teams": 0}, {"teams": 99}, {"shared": 1 << 20}, {"shared": 64}, {"workspace": 8}, {"counters": 1}),
    ],
    ids=str,
)
def test_a_plan_that_would_reach_outside_is_refused(changes, device):
    case = sequence(1, 100, 48, torch.bfloat16, device=device)
    plan = division(case)
    for name, value in changes.items():
        setattr(plan, name, value)
    results = [torch.empty_like(tensor) for tensor in case.score_select(UniformBudget(0.5), reference=True)[:5]]
    with pytest.raises(cuda.CudaLibraryError, match="CUDA error 1, invalid argument"):
        prefill.prune(tuple(vars(case).values()), (*results, None, None), [500_000] * 3, [0.0, 0.0], 100, plan=plan)


@pytest.mark.parametrize(
    "changes", [{"dtype": 3}, {"B": 0}, {"S": 65537}, {"D": 8193}, {"capacity": -1}, {"carries": 9}]
)
def test_arguments_out_of_range_are_refused(changes):
    library, plan = cuda.library(), cuda.Plan()
    call = cuda.Prune(B=1, S=10, D=16, capacity=10, dtype=2)
    for name, value in changes.items():
        setattr(call, name, value)
    assert library.asymvlm_prune_plan(ctypes.byref(call), ctypes.byref(plan)) == 1
    assert library.asymvlm_prune(ctypes.byref(call), ctypes.byref(plan), None) == 1


def test_ops_are_registered_well(cuda_library, monkeypatch, device):
    monkeypatch.undo()  # opcheck compares the storage of a result with that of its fake
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, cuda_library)
    case = sequence(2, 20, 8, device=device)
    ratios, numbers = two_launches.encode_budget(BUDGETS[2])  # type: ignore[misc]
    ids = torch.arange(40, device=device).view(2, 20)
    carry = ([ids, ids.expand(3, 2, 20)], [-1, 2.5], [False, True], 13, True)
    scores, counts = torch.randn(2, 20, device=device), torch.tensor([5, 9], device=device)
    with use_backend("cuda"):
        torch.library.opcheck(torch.ops.asymvlm.prune_static, (*vars(case).values(), ratios, numbers, *carry))
        torch.library.opcheck(torch.ops.asymvlm.score_select, (*vars(case).values(), ratios, numbers, 20))
        torch.library.opcheck(torch.ops.asymvlm.select_tokens, (scores, counts, None, 9))
        torch.library.opcheck(torch.ops.asymvlm.importance_gap, (scores, None))


def test_a_width_that_is_too_large_is_refused_by_name(cuda_backend, device):
    embeds, mask = torch.zeros(1, 2, 8200, device=device), torch.ones(1, 2, dtype=torch.bool, device=device)
    with pytest.raises(BackendError, match="cannot run prune_static: 2 tokens of width 8200, at most 65536 of 8192"):
        prune_sequence(embeds, mask, mask, static=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would wait for ever")
def test_the_emulator_tells_threads_that_wait_for_ever(device, capfd):
    case = sequence(1, 40, 16, torch.bfloat16, device=device)
    plan = division(case)
    results = [torch.empty_like(tensor) for tensor in select(case, UniformBudget(0.5))[:5]]
    counters = scratch.zeroed_counters(case.embeds.device, plan.counters)
    try:
        counters.fill_(-5)
        with pytest.raises(cuda.CudaLibraryError, match="719, threads wait for each other for ever"):
            prefill.prune(tuple(vars(case).values()), (*results, None, None), [500_000] * 3, [0.0, 0.0], 40, plan=plan)
    finally:
        counters.zero_()
