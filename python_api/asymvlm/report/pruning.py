"""What a pruned call did: token counts, scores, kept index, work and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from asymvlm.cache.report import EvictionReport
from asymvlm.hf.windows import sliding_window
from asymvlm.models.adapter import Adapter, Grid, Inputs
from asymvlm.models.flops import decoder_flops, layer_bytes, unpruned_cache_bytes, whole_cache_bytes
from asymvlm.prompt.columns import spread_out
from asymvlm.prompt.selection import Selection
from asymvlm.report.crowded import count_relevant, crowded_rows, warn_if_crowded
from asymvlm.report.recall import RecallReport
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.strategy import Choice
from asymvlm_kernels import Budget, ScoreBudget, ThresholdBudget
from asymvlm_kernels.budget import TIERS


def scored_columns(scores: torch.Tensor) -> torch.Tensor:
    """Columns of one row's prunable vision tokens, ascending int64, by its ``(S,)`` scores; a NaN one counts."""
    return (scores.isnan() | (scores > -math.inf)).nonzero()[:, 0]


@dataclass(eq=False)
class PruningReport:
    """Report of one pruned call, ``handle.last``. Lists have one entry a row of the batch.

    Tensors stay on the model's device; a property that needs the host copies on first use.
    """

    lengths_before: torch.Tensor  # (B,) real tokens
    lengths_after: torch.Tensor  # (B,)
    num_vision: torch.Tensor  # (B,) prunable vision tokens, N
    counts: torch.Tensor  # (B,) kept ones, K
    gaps: torch.Tensor  # (B,) fp32
    scores: torch.Tensor | None  # (B, S) fp32, -inf outside the prunable vision tokens; None where nothing was pruned
    index: torch.Tensor  # (B, S') int64, original place of each kept token, -1 = padding
    budget: Budget | ScoreBudget
    text_config: Any = field(repr=False)
    has_text: torch.Tensor = field(repr=False)  # (B,) bool
    columns_before: int  # S, padding included
    own: torch.Tensor | None = field(default=None, repr=False)  # (B, S) fp32, the scores before they spread
    vision: VisionPruning | None = field(default=None, repr=False)  # the settings, where tokens were scored
    image_grids: list[list[Grid]] | None = None  # of each row's images: rows and columns of vision tokens
    method: str = "asymvlm"  # by which vision tokens were scored
    tiling: str = "one"  # how those grids lie on the images (`asymvlm.report.tiles`)
    vision_flops: int | None = None  # the vision tower's work, which pruning does not save; None where unknown
    kv_bytes: int | None = None  # K and V of the prompt in the cache after prefill, without slots not filled yet
    kv_bytes_by_layer: list[int] | None = (
        None  # the same in each layer: later ones hold less where the method is inside
    )
    kv_bytes_before: int | None = None  # what the same cache would hold for the unpruned prompt
    stages: dict[int, torch.Tensor] = field(default_factory=dict)  # first layer -> (B,) tokens from there on, "inside"
    unpruned_because: str = ""  # why nothing was scored, where ``scores`` is None
    strategy: Choice | None = None  # what ``strategy="auto"`` chose for the call, and why
    recall: RecallReport | None = None  # what came back before a later question, where that is asked for
    eviction: EvictionReport | None = None  # of the last call of `generate`, where text or turns are evicted

    def measure(self, cache: Any) -> None:
        """Record the bytes a cache holds; called once, after prefill."""
        held = self.index.shape[1]
        self.kv_bytes_by_layer = layer_bytes(cache, held)
        self.kv_bytes = None if self.kv_bytes_by_layer is None else sum(self.kv_bytes_by_layer)
        window, columns = sliding_window(self.text_config), self.columns_before
        if self.stages:  # layers hold different numbers
            self.kv_bytes_before = whole_cache_bytes(cache, columns, window)
        else:
            self.kv_bytes_before = unpruned_cache_bytes(cache, held, columns, window)

    def at_original_columns(self, rows: torch.Tensor) -> torch.Tensor:
        """Spread what a call returned for its S' kept columns over the S columns of the prompt, differentiably.

        A removed column gets the row of the nearest kept one in front of it, which predicts what comes next; columns in
        front of the first kept one are zero.

        Args:
            rows: ``(B, S', ...)``: logits, hidden states.
        Returns:
            ``(B, S, ...)``.
        Raises:
            ValueError: for another shape.
        """
        if rows.ndim < 2 or rows.shape[:2] != self.index.shape:
            raise ValueError(
                f"rows must have the call's kept columns in front, {tuple(self.index.shape)}, got {tuple(rows.shape)}"
            )
        return spread_out(rows, self.index, self.columns_before)

    @cached_property
    def tokens_before(self) -> list[int]:
        return self.lengths_before.tolist()

    @cached_property
    def tokens_after(self) -> list[int]:
        return self.lengths_after.tolist()

    @cached_property
    def vision_tokens(self) -> list[int]:
        return self.num_vision.tolist()

    @cached_property
    def kept(self) -> list[int]:
        return self.counts.tolist()

    @cached_property
    def average_kept(self) -> list[float]:
        """Vision tokens that a layer of the decoder holds on average: by this, methods compare at equal work."""
        starts = [0, *self.stages, int(self.text_config.num_hidden_layers)]
        others = self.lengths_before - self.num_vision  # text and separators, which stay
        lengths = [self.lengths_before, *self.stages.values()] if self.stages else [self.lengths_after]
        starts = starts if self.stages else [0, starts[-1]]
        held = torch.stack([(length.to(others) - others) for length in lengths]).double()
        layers = torch.tensor(starts, device=held.device).diff().double()
        means: list[float] = ((held * layers[:, None]).sum(0) / starts[-1]).tolist()
        return means

    @cached_property
    def gap(self) -> list[float]:
        return self.gaps.tolist()

    @cached_property
    def keep_ratio(self) -> list[float]:
        """The ratio the budget asked for, before counts are rounded down; a `ScoreBudget` asks for a count."""
        if isinstance(self.budget, ScoreBudget):
            return [kept / n if n else 1.0 for kept, n in zip(self.kept, self.vision_tokens, strict=True)]
        return self.budget.keep_ratio(self.gaps).tolist()

    @cached_property
    def tier(self) -> list[str | None]:
        """The tier of a `ThresholdBudget`, None for other budgets."""
        if not isinstance(self.budget, ThresholdBudget):
            return [None] * len(self.kept)
        return [TIERS[tier] for tier in self.budget.tier(self.gaps).tolist()]

    @cached_property
    def flops_before(self) -> list[int]:
        """Language model, prompt only, by the paper's formula; the vision tower is in ``vision_flops``."""
        return [decoder_flops(self.text_config, n) for n in self.tokens_before]

    @cached_property
    def flops_after(self) -> list[int]:
        if not self.stages:
            return [decoder_flops(self.text_config, n) for n in self.tokens_after]
        starts = [0, *self.stages, int(self.text_config.num_hidden_layers)]
        lengths = [self.tokens_before, *(stage.tolist() for stage in self.stages.values())]
        return [
            sum(
                decoder_flops(self.text_config, n) * (end - start) // starts[-1]
                for start, end, n in zip(starts, starts[1:], row, strict=False)
            )
            for row in zip(*lengths, strict=True)
        ]

    @cached_property
    def nan_scores(self) -> list[int]:
        """Vision tokens whose score is NaN: they rank last."""
        return [0] * len(self.kept) if self.scores is None else self.scores.isnan().sum(-1).tolist()

    @cached_property
    def above_threshold(self) -> list[int] | None:
        """Vision tokens that look relevant: those above ``q05 + 0.2 * (q98 - q05)`` of the row's scores.

        Counted as `AtLeastRelevant` does, before scores spread. None where no score tells of the question. The first
        use copies the scores to the host, and warns where it was not done with the call.
        """
        return count_relevant(self)

    @cached_property
    def oversubscription(self) -> list[float] | None:
        """Tokens that look relevant for each that is kept; 0 where there are none."""
        above = self.above_threshold
        if above is None:
            return None
        return [found / kept if kept else 0.0 for found, kept in zip(above, self.kept, strict=True)]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader should know about a row, in words."""
        notes = []
        if self.strategy is not None:
            notes.append(self.strategy.reason)
        if self.scores is None:
            notes.append(self.unpruned_because)
        if self.recall is not None and self.recall.note:
            notes.append(self.recall.note)
        for row, (n, text) in enumerate(zip(self.vision_tokens, self.has_text.tolist(), strict=True)):
            if n == 0:
                notes.append(f"row {row}: no vision token to prune")
            elif not text:
                notes.append(f"row {row}: no text to score against, every vision token kept")
        notes += [f"row {row}: {words}" for row, words in crowded_rows(self).items()]
        notes += [f"row {row}: {count} NaN scores, ranked last" for row, count in enumerate(self.nan_scores) if count]
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Everything but the raw tensors, ready for ``json.dumps`` (NaN gaps become None)."""
        return {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "vision_tokens": self.vision_tokens,
            "kept": self.kept,
            "average_kept": self.average_kept,
            "keep_ratio": self.keep_ratio,
            "above_threshold": self.above_threshold,
            "oversubscription": self.oversubscription,
            "gap": [None if math.isnan(gap) else gap for gap in self.gap],
            "tier": self.tier,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "vision_flops": self.vision_flops,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_by_layer": self.kv_bytes_by_layer,
            "kv_bytes_before": self.kv_bytes_before,
            "kept_index": [[i for i in row if i >= 0] for row in self.index.tolist()],
            "image_grids": self.image_grids and [[list(grid) for grid in row] for row in self.image_grids],
            "method": self.method,
            "notes": self.notes,
            "strategy": self.strategy and self.strategy.to_dict(),
            "recall": self.recall and self.recall.to_dict(),
            "eviction": self.eviction and self.eviction.to_dict(),
        }


def report_of(
    selection: Selection,
    model: nn.Module,
    adapter: Adapter,
    policy: VisionPruning,
    inputs: Inputs,
    stages: Mapping[int, torch.Tensor] | None = None,
) -> PruningReport:
    """The report of a call whose prompt was shortened as ``selection`` says, or between layers, at ``stages``."""
    config: Any = model.config
    report = PruningReport(
        **vars(selection),
        vision=policy,
        stages=dict(stages or {}),
        budget=policy.budget,
        method=policy.scored_by.name or type(policy.scored_by).__name__,
        text_config=config.get_text_config(),
        tiling=adapter.tiling,
        vision_flops=adapter.flops_of(model, inputs),
    )
    if report.index.device.type == "cpu":  # elsewhere the count would wait for the device: when it is first read
        warn_if_crowded(report)
    return report


def reported(output: Any, report: PruningReport | None) -> Any:
    """What a call returns, with the call's report on it where it can carry one."""
    if report is not None and not isinstance(output, (torch.Tensor, tuple)):
        output.pruning_report = report
    return output
