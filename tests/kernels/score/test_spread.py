"""Spread against plain Python, and inside prune_sequence: what is selected is what the spread scores say."""

from __future__ import annotations

import math
import re

import pytest
import torch

from asymvlm_kernels import Spread, UniformBudget, importance_gap, prune_sequence, score_tokens
from asymvlm_kernels.testing import exact_inputs

INF = float("inf")


def naive(scores: list[float], lines: list[int], reach: int, share: float) -> list[float]:
    out = []
    for i, (score, line) in enumerate(zip(scores, lines, strict=True)):
        near = range(max(0, i - reach), min(len(scores), i + reach + 1))
        best = max([scores[j] for j in near if lines[j] == line and not math.isnan(scores[j])], default=-INF)
        spreads = line >= 0 and score > -INF
        out.append((1 - share) * score + share * best if spreads else score)
    return out


@pytest.mark.parametrize("reach,share", [(1, 0.5), (2, 0.25), (4, 1.0), (50, 0.75)])
def test_spread_equals_plain_python(reach: int, share: float) -> None:
    generator = torch.Generator().manual_seed(reach)
    scores = torch.randint(-8, 8, (3, 23), generator=generator) / 8  # exact in binary, as the shares are
    lines = torch.arange(23).div(6, rounding_mode="floor").repeat(3, 1)
    lines[1, 4:9] = -1
    scores[2, ::5] = -INF
    wanted = torch.tensor([naive(s, l, reach, share) for s, l in zip(scores.tolist(), lines.tolist(), strict=True)])
    assert torch.equal(Spread(reach, share).apply(scores, lines), wanted)


def test_lines_keep_apart_and_nan_stays_where_it_is() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.5, math.nan, 0.0]])
    lines = torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    out = Spread(reach=2, share=1.0).apply(scores, lines)
    assert out[0, :4].tolist() == [1.0, 1.0, 0.5, 0.5]
    assert math.isnan(out[0, 4])
    assert out[0, 5] == 0.5


def test_row_does_not_depend_on_its_batch() -> None:
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    lines = torch.arange(30).div(7, rounding_mode="floor").expand(4, -1)
    whole = Spread().apply(scores, lines)
    assert torch.equal(whole[2:3], Spread().apply(scores[2:3], lines[2:3]))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prune_sequence_selects_by_the_spread_scores(padding_side: str) -> None:
    inputs = exact_inputs(2, 40, 1, 16, seed=3)
    vision = torch.zeros(2, 40, dtype=torch.bool)
    vision[:, 2:34] = True
    text = ~vision
    lines = torch.where(vision, (torch.arange(40) - 2) // 8, -1)
    spread = Spread(reach=3, share=0.5)
    options = dict(budget=UniformBudget(0.4), padding_side=padding_side)
    pruned = prune_sequence(inputs.vision, vision, text, inputs.weight, spread=spread, lines=lines, **options)
    own = score_tokens(inputs.vision, inputs.vision, inputs.weight, vision_mask=vision, text_mask=text)
    wanted = spread.apply(own, lines)
    assert torch.equal(pruned.scores, wanted)
    assert torch.equal(pruned.gap, importance_gap(wanted, vision))
    for row in range(2):
        order = sorted(range(2, 34), key=lambda i: (-float(wanted[row, i]), i))[: 32 * 4 // 10]
        assert [i for i in pruned.index[row].tolist() if 2 <= i < 34] == sorted(order)
    plain = prune_sequence(inputs.vision, vision, text, inputs.weight, **options)
    assert not torch.equal(plain.index, pruned.index)


@pytest.mark.parametrize("arguments", [{"reach": 0}, {"reach": 1.5}, {"reach": True}, {"share": 0}, {"share": 1.5}])
def test_bad_settings_are_named(arguments: dict) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name} must be .* got {re.escape(repr(value))}"):
        Spread(**arguments)


def test_bad_tensors_are_named() -> None:
    scores, lines = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64)
    for bad_scores, bad_lines, name in (
        (scores.double(), lines, "scores"),
        (scores[0], lines, "scores"),
        (scores, lines[:, :4], "lines"),
        (scores, lines.float(), "lines"),
    ):
        with pytest.raises(ValueError, match=name):
            Spread().apply(bad_scores, bad_lines)
    embeds, mask = torch.zeros(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="lines"):
        prune_sequence(embeds, mask, mask, spread=Spread())
