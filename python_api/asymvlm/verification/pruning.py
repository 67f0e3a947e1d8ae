"""The pruned run against the masked run of the tokens it kept."""

from __future__ import annotations

from typing import Any

import torch

from asymvlm.patch import patch
from asymvlm.prompt.columns import marked_columns
from asymvlm.report.pruning import PruningReport
from asymvlm.verification.closed import ClosedColumns
from asymvlm.verification.measure import TIMES_NOISE, hidden_apart, judge, logits_apart
from asymvlm.verification.names import decoder_of
from asymvlm.verification.report import FAIL, PASS, SKIPPED, CheckRow
from asymvlm.verification.runs import Run, masked_run, run
from asymvlm.verification.subject import Subject


def check_pruning(subject: Subject) -> list[CheckRow]:
    subject.tell("the pruned run")
    with patch(subject.model, vision=subject.vision) as handle:
        pruned = run(subject.model, subject.sample, subject.steps)
        report = handle.last
    if report is None:
        return [CheckRow("pruned against masked", FAIL, note="the patch took no notice of the images")]
    keep = kept_columns(report, subject.real)
    dropped = int((subject.real & ~keep).sum())
    if not dropped:
        note = f"nothing to compare: the budget keeps all {report.vision_tokens} vision tokens of this prompt"
        return [CheckRow("pruned against masked", SKIPPED, note=note)]
    rows = [_cache_length(pruned, keep, subject.real)]
    if subject.vision.positions != "keep":
        note = "positions='compact' renumbers what is kept, and a masked run has the model's own positions"
        return [*rows, CheckRow("pruned against masked", SKIPPED, note=note)]
    if subject.adapter.recurrent:
        return [*rows, _kept_only(subject, pruned, report)]
    subject.tell("the masked run of the same tokens")
    masked = masked_run(subject.model, subject.sample, subject.steps, ClosedColumns([keep]), pruned.tokens)
    return rows + compare(subject, pruned, masked, report.index, dropped) + [_control(subject, masked, keep, report)]


def compare(subject: Subject, pruned: Run, masked: Run, index: torch.Tensor, dropped: int) -> list[CheckRow]:
    """Rows of a pruned run ``(B, S', D)`` and the masked one of the same tokens, which ``index`` ``(B, S')`` tells."""
    noise, lowest = subject.noise, subject.floor
    index = index.to(pruned.hidden.device)
    rows, slots = (index >= 0).nonzero(as_tuple=True)
    hidden = hidden_apart(pruned.hidden[rows, slots], masked.hidden[rows, index[rows, slots]])
    first = logits_apart(pruned.logits[:, :1], masked.logits[:, :1])
    steps = logits_apart(pruned.logits[:, 1:], masked.logits[:, 1:])
    count = pruned.tokens.shape[1]
    return [
        judge(
            "pruned = masked: last hidden states",
            hidden,
            noise.hidden,
            lowest,
            f"{len(rows)} kept tokens, {dropped} dropped",
        ),
        judge("pruned = masked: first-token logits", first, noise.logits, lowest),
        judge(f"pruned = masked: {count - 1} forced steps", steps, noise.logits, lowest),
        greedy_row("pruned = masked: greedy tokens", pruned, masked, noise.logits, lowest),
    ]


def greedy_row(check: str, found: Run, masked: Run, noise: float, lowest: float) -> CheckRow:
    """Whether the masked run, at every step of the other's tokens, would have chosen the same one.

    Two logits that are closer than both may move can change places without a fault.
    """
    chosen = masked.logits.argmax(-1)
    differ = (chosen != found.tokens).nonzero().tolist()
    allowed = 2 * max(TIMES_NOISE * noise, lowest)
    if not differ:
        return CheckRow(check, PASS, 0.0, None, allowed, f"the same {found.tokens.numel()}")
    row, step = differ[0]
    gaps = masked.logits.gather(-1, chosen[..., None]) - masked.logits.gather(-1, found.tokens[..., None])
    gap = float((gaps[..., 0] / masked.logits.std(-1)).amax())
    note = (
        f"{len(differ)} of {found.tokens.numel()} differ, first in row {row} at step {step}: "
        f"{int(found.tokens[row, step])} instead of {int(chosen[row, step])}; the largest gap between two such logits "
        f"is {gap:.1e} standard deviations, "
    )
    note += "no more than rounding explains" if gap <= allowed else "which rounding does not explain"
    return CheckRow(check, PASS if gap <= allowed else FAIL, gap, noise, allowed, note)


def kept_columns(report: PruningReport, real: torch.Tensor) -> torch.Tensor:
    """``(B, S)`` bool: columns that the pruned run kept, and padding, which the mask closes itself."""
    return marked_columns(report.index.to(real.device), real.shape[1]) | ~real


def _cache_length(pruned: Run, keep: torch.Tensor, real: torch.Tensor) -> CheckRow:
    found, wanted = sorted(set(pruned.kv_columns)), int((keep & real).sum(1).amax())
    note = f"{len(pruned.kv_columns)} layers hold {found} columns, wanted {wanted} of {keep.shape[1]}"
    return CheckRow("K/V length of full-attention layers", PASS if found == [wanted] else FAIL, note=note)


def _control(subject: Subject, masked: Run, keep: torch.Tensor, report: PruningReport) -> CheckRow:
    """Whether the comparison would notice one token: the masked run again, with one kept vision token closed too."""
    check = "control: one kept token less is noticed"
    subject.tell("a control with one token less")
    vision = subject.adapter.vision_mask(subject.model, subject.sample["input_ids"]) & keep & subject.real
    scores = torch.full(keep.shape, -torch.inf) if report.scores is None else report.scores
    best = scores.to(keep.device).nan_to_num(nan=-torch.inf).masked_fill(~vision, -torch.inf).argmax(1)
    less = keep.clone()
    less[torch.arange(len(keep), device=keep.device), best] = False
    other = masked_run(subject.model, subject.sample, 1, ClosedColumns([less]))
    difference = logits_apart(other.logits[:, :1], masked.logits[:, :1])
    allowed = max(TIMES_NOISE * subject.noise.logits, subject.floor)
    if difference == 0:
        return CheckRow(check, FAIL, 0.0, None, allowed, "closing a column changed nothing: nothing is masked")
    note = "" if difference > allowed else "too small to see in this dtype: verify in float32 to notice single tokens"
    return CheckRow(check, PASS, difference, subject.noise.logits, allowed, note)


@torch.no_grad()
def _kept_only(subject: Subject, pruned: Run, report: PruningReport) -> CheckRow:
    """Recurrent layers keep a state of every token they saw, so the decoder alone runs on the kept ones."""
    subject.tell("the kept tokens alone")
    decoder: Any = decoder_of(subject.model)
    seen: dict[str, Any] = {}

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.setdefault("embeds", kwargs["inputs_embeds"])
        seen.setdefault("positions", kwargs.get("position_ids"))

    hook = decoder.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run(subject.model, subject.sample, 1)
    finally:
        hook.remove()
    index = report.index.to(seen["embeds"].device)
    rows, places = torch.arange(len(index), device=index.device)[:, None], index.clamp_min(0)
    positions = seen["positions"].expand(*seen["positions"].shape[:-2], len(index), -1)
    alone = decoder(
        inputs_embeds=seen["embeds"][rows, places] * (index >= 0)[..., None],
        attention_mask=(index >= 0).long(),
        position_ids=positions[..., rows, places],
        use_cache=False,
    )[0]
    difference = hidden_apart(pruned.hidden[index >= 0], alone[index >= 0])
    note = (
        f"{subject.adapter.model_type} has recurrent layers, whose state a mask does not reach: compared with the "
        "decoder on the kept tokens alone at their own positions, prefill only"
    )
    return judge(
        "pruned = kept tokens alone: last hidden states", difference, subject.noise.hidden, subject.floor, note
    )
