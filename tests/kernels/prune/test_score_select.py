"""First launch of prune_sequence: scores, gap, budget and kept places equal the reference, whatever the masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import BUDGETS, assert_same, sequence

from asymvlm_kernels import UniformBudget
from asymvlm_kernels.prefill.prune import scratch, two_launches
from asymvlm_kernels.testing import DTYPES, literal_scores
from asymvlm_kernels.tuning import prune as tuning

NAN, INF = float("nan"), float("inf")
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@any_dtype
@pytest.mark.parametrize("B,S,D,text", [(1, 1, 1, 0.5), (2, 70, 70, 0.1), (1, 160, 264, 0.6), (2, 200, 100, 0.2)])
def test_equals_the_reference_bit_for_bit(B, S, D, text, dtype, device):
    case = sequence(B, S, D, dtype, text=text, device=device)  # 160 places: more than two blocks of text
    budget = BUDGETS[S % len(BUDGETS)]
    assert_same(case.score_select(budget), case.score_select(budget, reference=True))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_budget(budget, device):
    case = sequence(3, 90, 16, seed=3, device=device)
    assert_same(case.score_select(budget), case.score_select(budget, reference=True))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_masks(data):
    S = data.draw(st.integers(1, 150))
    shares = {name: data.draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])) for name in ("text", "protected", "padding")}
    case = sequence(data.draw(st.integers(1, 2)), S, 8, **shares, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        case.protect = None
    if data.draw(st.booleans()):
        case.weight = None
    budget = data.draw(st.sampled_from(BUDGETS))
    capacity = data.draw(st.sampled_from([S, S // 2, 0]))
    expected = case.score_select(budget, reference=True, capacity=capacity)
    assert_same(case.score_select(budget, capacity=capacity), expected)
    assert (expected[3] <= capacity).all()


def test_rows_without_text_or_vision(device):
    case = sequence(4, 80, 8, device=device)
    case.text_mask[0] = False
    case.vision_mask[1] = False
    case.text_mask[2] = case.vision_mask[2] = case.protect[2] = False  # all padding
    case.protect[3] = True  # nothing to prune
    result = case.score_select(UniformBudget(0.25))
    assert_same(result, case.score_select(UniformBudget(0.25), reference=True))
    assert result[2][0] == (case.vision_mask[0] & ~case.protect[0]).sum()
    assert result[3][2] == 0


@any_dtype
def test_special_values_rank_as_the_reference(dtype, device):
    case = sequence(1, 90, 64, dtype, text=0.05, protected=0, device=device)
    prunable = case.vision_mask[0].nonzero()[:, 0]
    case.embeds[0, prunable[0]] = 0
    case.embeds[0, prunable[1], 3] = NAN
    case.embeds[0, prunable[2], 5] = INF
    for ratio in (0.02, 0.5, 0.999):
        budget = UniformBudget(ratio)
        assert_same(case.score_select(budget), case.score_select(budget, reference=True))
    case.embeds[0, (case.text_mask & ~case.vision_mask)[0].nonzero()[0, 0], 1] = NAN
    result = case.score_select(UniformBudget(0.5))
    assert_same(result, case.score_select(UniformBudget(0.5), reference=True))
    assert result[0][case.vision_mask].isnan().all()


@any_dtype
@pytest.mark.parametrize("text", [0.1, 0.6])  # one block of text: split by width; several: by text
def test_error_at_a_real_width_is_below_one_hundred_thousandth(text, dtype, device):
    case = sequence(1, 64, 3072, dtype, text=text, protected=0, exact=False, device=device)
    rows = case.embeds[0]
    vision, texts = rows[case.vision_mask[0]][None], rows[(case.text_mask & ~case.vision_mask)[0]][None]
    exact = literal_scores(vision, texts, case.weight, torch.float64)[0]
    scores = case.score_select(UniformBudget(0.5))[0][case.vision_mask]
    assert (scores.double() - exact).abs().max() < (1e-5 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e4])
def test_small_and_large_weights_keep_their_digits_in_fp16(scale, device):
    case = sequence(1, 60, 256, torch.float16, protected=0, exact=False, device=device)
    case.weight *= scale
    rows = case.embeds[0]
    vision, texts = rows[case.vision_mask[0]][None], rows[(case.text_mask & ~case.vision_mask)[0]][None]
    exact = literal_scores(vision, texts, case.weight, torch.float64)[0]
    scores = case.score_select(UniformBudget(0.5))[0][case.vision_mask]
    assert (scores.double() - exact).abs().max() < 1e-6 * scale


@any_dtype
def test_a_sample_scores_the_same_in_any_batch(dtype, device):
    case = sequence(2, 70, 136, dtype, exact=False, device=device)
    together = case.score_select(UniformBudget(0.5))
    for row in range(2):
        alone = sequence(2, 70, 136, dtype, exact=False, device=device)
        for name in ("embeds", "vision_mask", "text_mask", "protect"):
            setattr(alone, name, getattr(alone, name)[row : row + 1])
        single = alone.score_select(UniformBudget(0.5))
        assert torch.equal(single[0][0], together[0][row])
        assert torch.equal(single[1][0], together[1][row])
    again = case.score_select(UniformBudget(0.5))
    assert all(torch.equal(a, b) for a, b in zip(again[:4], together[:4], strict=True))


def test_padding_moves_no_score(device):
    case = sequence(1, 40, 40, exact=False, device=device)
    scores = case.score_select(UniformBudget(0.5))[0]
    for before, after in ((37, 0), (0, 17)):
        padded = sequence(1, 40, 40, exact=False, device=device)
        for name in ("embeds", "vision_mask", "text_mask", "protect"):
            pad = (0, 0, before, after) if name == "embeds" else (before, after)
            setattr(padded, name, torch.nn.functional.pad(getattr(padded, name), pad))
        result = padded.score_select(UniformBudget(0.5))[0]
        assert torch.equal(result[:, before : before + 40], scores)


def test_strided_inputs_need_no_copy(device):
    case = sequence(2, 50, 48, device=device)
    expected = case.score_select(UniformBudget(0.5), reference=True)
    for name in ("embeds", "vision_mask", "text_mask", "protect", "weight"):
        tensor = getattr(case, name)
        wide = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype, device=device)
        setattr(case, name, wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor))
    assert_same(case.score_select(UniformBudget(0.5)), expected)


def test_counters_are_left_zero(device):
    sequence(2, 150, 8, device=device).score_select(UniformBudget(0.5))
    assert scratch._counters
    assert all(not counters.any() for counters in scratch._counters.values())


TWO_BLOCKS = [(dtype, 65) for dtype in DTYPES]
SPLITS = [(1, 0), (3, 1), (3, 2), (6, 1), (6, 2)]  # parts of a tile, turns in which they share a block of text


@pytest.mark.parametrize("dtype,L", [(torch.bfloat16, 1), (torch.bfloat16, 64), (torch.bfloat16, 330), *TWO_BLOCKS])
def test_how_a_tile_is_split_changes_no_bit(L, dtype, device, monkeypatch):
    case = sequence(1, 70 + L, 200, dtype, exact=False, protected=0.0, device=device)
    case.vision_mask[:] = torch.arange(70 + L) < 70
    case.text_mask = ~case.vision_mask
    found = []
    for parts, rounds in SPLITS if device.type == "cuda" or dtype == torch.bfloat16 else SPLITS[::2]:
        monkeypatch.setattr(two_launches, "split_of", lambda *_, split=(parts, rounds): tuning.Split(*split))
        found.append(case.score_select(UniformBudget(0.5)))
    *first, own = found[0]
    for *other, other_own in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert own == other_own == [], "nothing spreads"
    torch.testing.assert_close(found[0][0], case.score_select(UniformBudget(0.5), reference=True)[0], atol=2e-6, rtol=0)


def test_a_batch_is_split_by_its_size():
    config = tuning.score_select_config(3072, torch.bfloat16, 8, 90)
    splits = {tiles: tuning.split_of(tiles, 3072, config, 132) for tiles in (1, 5, 40, 320, 2560)}
    assert splits == {
        1: tuning.Split(6, 2),
        5: tuning.Split(6, 2),
        40: tuning.Split(3, 2),  # 2500 tokens: 120 programs on 132 processors
        320: tuning.Split(1, 0),
        2560: tuning.Split(1, 0),
    }
    assert tuning.split_of(40, 64, config, 132).parts == 1  # one step: nothing to share


def test_scratch_stays_small_beside_the_embeddings(monkeypatch):
    monkeypatch.setattr(scratch, "zeroed_counters", lambda device, size: torch.empty(size, dtype=torch.int32))
    for B, S, D in ((1, 2540, 3072), (1, 296, 3840), (1, 16424, 3584), (64, 2540, 3072), (8, 1000, 3584)):
        for arch in (80, 89, 90, 100, 120):
            for dtype in DTYPES:
                config = tuning.score_select_config(D, dtype, 16 // dtype.itemsize, arch)
                split = tuning.split_of(B * -(-S // config.block_n), D, config, 132)
                pieces = scratch.scratch_of(B, S, config, split, tuning.rank_config(S), torch.device("meta"))
                size = pieces.parts.untyped_storage().nbytes() + pieces.counters.nbytes + 4 * B * S  # `order` too
                assert size < max(0.4 * B * S * D * dtype.itemsize, 5_000_000), (B, S, D, arch, dtype, size)
