"""A run that evicts generated tokens against a run that only stops seeing them."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from asymvlm.patch import patch
from asymvlm.settings.eviction import TextEviction
from asymvlm.verification.closed import ClosedColumns, Open
from asymvlm.verification.measure import judge, logits_apart
from asymvlm.verification.pruning import greedy_row
from asymvlm.verification.report import FAIL, UNSUPPORTED, CheckRow
from asymvlm.verification.runs import masked_run, run
from asymvlm.verification.subject import EVICTION_STEPS, Subject

CHECK = "evicted = masked"
THRESHOLD = 6  # small, so that several evictions happen in `EVICTION_STEPS`


def check_eviction(subject: Subject) -> list[CheckRow]:
    """Generated tokens alone are evicted: the prompt stays whole in both runs."""
    subject.tell("the evicting run")
    try:
        handle = patch(subject.model, text=_often(subject.text))
    except (NotImplementedError, ValueError) as error:
        return [CheckRow(CHECK, UNSUPPORTED, note=str(error))]
    held: list[dict[int, torch.Tensor]] = []
    sliding: list[bool] = []

    def watch(cache: Any) -> None:
        if cache is not None:  # after the step's attention, so for the next step
            held.append(_held(cache, subject.real.shape[1] + len(held)))
            sliding[:] = cache.is_sliding

    with handle:
        evicting = run(subject.model, subject.sample, EVICTION_STEPS, each_step=watch)
    real, prompt = subject.real, subject.real.shape[1]
    last = torch.cat([*held[-1].values()], 1)  # (B, lists, columns)
    lost = int((real & ~last.all(1)[:, :prompt]).sum())
    if lost:
        return [CheckRow(CHECK, FAIL, note=f"{lost} tokens of the prompt were evicted, wanted generated ones alone")]
    evicted = (~last[:, 0, prompt:]).sum(1).tolist()
    if not all(evicted):
        return [CheckRow(CHECK, FAIL, note=f"{evicted} tokens of each row were evicted, wanted some")]
    subject.tell("the masked run of the same evictions")
    everything = torch.ones_like(real)
    columns = ClosedColumns([everything, *(_opened(alive, real) for alive in held)], _closes(subject, sliding))
    masked = masked_run(subject.model, subject.sample, EVICTION_STEPS, columns, evicting.tokens)
    difference = logits_apart(evicting.logits, masked.logits)
    noise = subject.noise.logits
    note = f"{evicted} of {EVICTION_STEPS - 1} cached answer tokens of each row evicted on the way"
    return [
        judge(f"{CHECK}: {EVICTION_STEPS} forced steps", difference, noise, subject.floor, note),
        greedy_row(f"{CHECK}: greedy tokens", evicting, masked, noise, subject.floor),
    ]


def _held(cache: Any, columns: int) -> dict[int, torch.Tensor]:
    """``(B, lists, columns)`` of each layer that keeps its tokens in slots: one list for its heads, or for each one."""
    tables = {number: layer.table for number, layer in enumerate(cache.layers) if hasattr(layer, "table")}
    return {
        number: table.alive_by_line(0, columns).unflatten(0, (table.rows, table.heads))
        for number, table in tables.items()
    }


def _opened(alive: dict[int, torch.Tensor], real: torch.Tensor) -> Open:
    """What is held, and padding, which the model's own mask closes; of all layers where they hold the same."""
    first = next(iter(alive.values()))
    padding = torch.nn.functional.pad(~real, (0, first.shape[-1] - real.shape[1]), value=False)[:, None]
    if first.shape[1] == 1 and all(torch.equal(one, first) for one in alive.values()):
        return (first | padding)[:, 0]
    return {number: one | padding for number, one in alive.items()}


def _often(policy: TextEviction | None) -> TextEviction:
    """The caller's settings with the smallest threshold that evicts often and that they allow."""
    if policy is None:
        return TextEviction(THRESHOLD, 0.5)
    threshold = THRESHOLD
    while policy.kept(threshold) < max(1, policy.recent or 0):
        threshold += 1
    return dataclasses.replace(policy, threshold=threshold)


def _closes(subject: Subject, sliding: list[bool]) -> Any:
    """Which layers lose sight of evicted tokens: full-attention ones, and sliding ones if the settings say so."""
    config: Any = cast("Any", subject.model.config).get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    everywhere = subject.text is not None and subject.text.sliding == "mask"

    def closes(layer: int) -> bool:
        if everywhere or not any(sliding):
            return True
        slides = sliding[layer] if layer < len(sliding) else kinds[layer] == "sliding_attention"
        return not slides

    return closes


__all__ = ["check_eviction"]
