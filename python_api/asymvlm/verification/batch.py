"""Rows of a pruned batch, left padded and of different lengths and budgets, against the samples by themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from asymvlm.patch import patch
from asymvlm.report.pruning import PruningReport
from asymvlm.settings.policies import VisionPruning
from asymvlm.verification.closed import ClosedColumns
from asymvlm.verification.measure import hidden_apart, judge, logits_apart
from asymvlm.verification.report import SKIPPED, CheckRow
from asymvlm.verification.runs import Run, masked_run, run
from asymvlm.verification.samples import Sample, collated
from asymvlm.verification.subject import Subject
from asymvlm_kernels import ThresholdBudget

CHECK = "batch rows = single runs"


def check_batch(subject: Subject) -> list[CheckRow]:
    model, pair, steps = subject.model, subject.pair, subject.steps
    if pair is None:
        note = "the inputs are a batch already, whose images cannot be told apart: pass one sample to check this"
        return [CheckRow(CHECK, SKIPPED, note=note)]
    if isinstance(subject.vision.text, torch.Tensor):
        return [CheckRow(CHECK, SKIPPED, note="the text mask is for one shape of call, a batch has another")]
    subject.tell("a batch of two, pruned")
    vision = _two_tiers(subject, pair)
    singles = [_pruned(model, vision, sample, steps) for sample in pair]
    tokens = torch.cat([single.tokens for single, _ in singles])
    found, report = _pruned(model, vision, collated(model, subject.adapter, pair), steps, tokens)
    return [
        _compare(subject, vision, sample, (found.row(row), report, row), single)
        for row, (sample, single) in enumerate(zip(pair, singles))
    ]


def _compare(
    subject: Subject,
    vision: VisionPruning,
    sample: Sample,
    batch: tuple[Run, PruningReport, int],
    single: tuple[Run, PruningReport],
) -> CheckRow:
    found, report, row = batch
    wanted, alone = single
    columns = sample["input_ids"].shape[1]
    index = report.index[row][report.index[row] >= 0] - (report.columns_before - columns)
    own = alone.index[0][alone.index[0] >= 0]
    note = f"{len(own)} of {columns} tokens kept"
    hidden = found.hidden[0, report.index[row] >= 0]
    if torch.equal(index, own):
        reference = wanted.hidden[0, alone.index[0] >= 0]
    else:
        note = _why_others(report, alone, row, index, own)
        if subject.adapter.recurrent or vision.positions != "keep":
            return CheckRow(f"{CHECK}: row {row}", SKIPPED, note=note)
        keep = torch.zeros(1, columns, dtype=torch.bool, device=index.device)
        keep[0, index] = True
        wanted = masked_run(subject.model, sample, subject.steps, ClosedColumns([keep]), wanted.tokens)
        reference = wanted.hidden[0, index]
    difference = max(hidden_apart(hidden, reference), logits_apart(found.logits, wanted.logits))
    return judge(f"{CHECK}: row {row}", difference, subject.noise.largest, subject.floor, note)


def _why_others(report: PruningReport, alone: PruningReport, row: int, index: torch.Tensor, own: torch.Tensor) -> str:
    """That a batch keeps other tokens than a sample by itself, if near ties explain it.

    Raises:
        RuntimeError: if they do not.
    """
    others = sorted({*index.tolist()} ^ {*own.tolist()})
    if alone.scores is None or report.scores is None or len(index) != len(own):
        raise RuntimeError(f"row {row} keeps {len(index)} tokens in a batch and {len(own)} by itself")
    offset = report.scores.shape[1] - alone.scores.shape[1]
    scores, moved = alone.scores[0], report.scores[row, offset:]
    vision = scores.isfinite() & moved.isfinite()
    noise = float((scores - moved)[vision].abs().amax())
    spread = float(scores[others].amax() - scores[others].amin())
    words = (
        f"the batch keeps {len(others) // 2} other tokens than the sample by itself; their scores lie within "
        f"{spread:.1e}, and scores move by up to {noise:.1e} between batch and sample"
    )
    if not spread <= 2 * noise:
        raise RuntimeError(words)
    return f"{words}: compared with the masked sample that keeps the same"


def _two_tiers(subject: Subject, pair: list[Sample]) -> VisionPruning:
    """The settings with a budget that gives the two samples different ratios; their own where gaps do not tell."""
    gaps = [float(_pruned(subject.model, subject.vision, sample, 1)[1].gaps[0]) for sample in pair]
    low, high = sorted(gaps)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return subject.vision
    middle = (low + high) / 2
    budget = ThresholdBudget(middle, middle, conservative=0.75, moderate=0.625, aggressive=0.5)
    return dataclasses.replace(subject.vision, budget=budget)


def _pruned(
    model: Any, vision: VisionPruning, sample: Mapping[str, Any], steps: int, forced: torch.Tensor | None = None
) -> tuple[Run, PruningReport]:
    with patch(model, vision=vision) as handle:
        result = run(model, sample, steps, forced=forced)
        if handle.last is None:
            raise RuntimeError("the patch took no notice of the images")
        return result, handle.last


__all__ = ["check_batch"]
