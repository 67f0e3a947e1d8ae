"""Prompts with random masks, and the two-launch path beside its reference: for all tests of `prune_sequence`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm_kernels import Budget, LinearBudget, ThresholdBudget, UniformBudget
from asymvlm_kernels.prefill.prune import two_launches
from asymvlm_kernels.testing import exact_inputs, prefill_inputs

BUDGETS: tuple[Budget, ...] = (
    UniformBudget(0.5),
    UniformBudget(1.0),
    ThresholdBudget(gap_low=0.12, gap_high=0.2, conservative=0.9, moderate=0.6, aggressive=0.3),
    LinearBudget(target=0.5, slope=-0.7, mean_gap=0.2),
    LinearBudget(target=0.123456, slope=3.3, mean_gap=0.05, minimum=0.1, maximum=0.777),
)


@dataclass
class Sequence:
    """``(B, S, D)``, three ``(B, S)`` masks and ``(D,)``."""

    embeds: torch.Tensor
    vision_mask: torch.Tensor
    text_mask: torch.Tensor
    protect: torch.Tensor | None
    weight: torch.Tensor | None

    def score_select(
        self, budget: Budget, *, reference: bool = False, capacity: int | None = None
    ) -> two_launches.ScoreSelect:
        encoded = two_launches.encode_budget(budget)
        assert encoded is not None
        run = two_launches._score_select_reference if reference else two_launches._score_select_triton
        return run(*vars(self).values(), *encoded, self.embeds.shape[1] if capacity is None else capacity)


def sequence(
    B: int,
    S: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    text: float = 0.1,
    protected: float = 0.05,
    padding: float = 0.05,
    exact: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sequence:
    """Random masks that overlap; ``exact`` scores are the same on every backend and tie often."""
    inputs = (exact_inputs if exact else prefill_inputs)(B, S, 1, D, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, B, S, generator=generator)
    vision_mask = draw[0] > text + padding
    text_mask = (draw[0] < text) | (draw[1] < 0.03)
    parts = (inputs.vision, vision_mask, text_mask, draw[2] < protected, inputs.weight)
    return Sequence(*(part.to(device) for part in parts))


def assert_same(result: two_launches.ScoreSelect, expected: two_launches.ScoreSelect) -> None:
    """Bitwise: scores, gap, counts, lengths and the kept places."""
    for name, got, want in zip(("scores", "gap"), result, expected, strict=False):
        assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
    for name, got, want in zip(("counts", "lengths"), result[2:], expected[2:], strict=False):
        assert got.tolist() == want.tolist(), name
    assert torch.equal(result[4], expected[4]), "order"
