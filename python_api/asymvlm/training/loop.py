"""`train_scorer`: learn the weight of Eq. 1 from what pruning does to the model's last hidden states.

Two passes of the frozen model a sample: as it is, and with a soft mask on its vision keys that depends on the weight.
Only the weight learns. Source: section 3.2, Eq. 4, appendices C and D of arXiv:2605.29535.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.identity import identify
from asymvlm.policies import VisionPruning
from asymvlm.scorer import GapStatistics, Scorer
from asymvlm.training.passes import FrozenModel
from asymvlm.training.progress import progress_bar
from asymvlm.training.ranks import Ranks
from asymvlm.training.scoring import batch_gaps, row_losses
from asymvlm.training.settings import CLAMPED_SHARE, HIGHEST, LOWEST, TrainingSettings
from asymvlm.training.state import TrainingState
from asymvlm.user_turns import UserTurns
from asymvlm.weights import fp32_weight
from asymvlm_kernels import UniformBudget

logger = logging.getLogger(__name__)
Collate = Callable[[list[Any]], Mapping[str, Any]]


def train_scorer(
    model: nn.Module,
    samples: Sequence[Any],
    settings: TrainingSettings | str = "default",
    *,
    text: str | UserTurns = "all",
    processor: Any = None,
    collate: Collate | None = None,
    micro_batch_size: int = 1,
    validation: Sequence[Any] | None = None,
    initial: torch.Tensor | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    save_every: int = 100,
    gap_samples: int = 512,
    data: str = "",
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    **changes: Any,
) -> Scorer:
    """Train the learned weight of a frozen model.

    Args:
        model: a supported Hugging Face vision-language model, on the device and in the dtype to train in (bf16 is fine:
            weight, scores, penalty and loss are fp32). It comes back bit for bit as it was.
        samples: what ``model(**sample)`` takes, as its processor returns it, each of one row or a whole batch. Where
            ``labels`` are given, tokens with a label (not -100) are a teacher-forced answer: compared, never scored
            against. ``text_mask`` ``(B, S)`` bool narrows the text that vision is scored against.
        settings: `TrainingSettings`, ``"default"`` or ``"paper"``; ``changes`` override single ones.
        text: what vision is scored against, as in `VisionPruning`: ``"all"``, or ``"user"`` with its ``processor``.
        processor: for ``text="user"``. Not kept.
        collate: turns a list of ``micro_batch_size`` samples into model inputs; then samples may be anything.
        micro_batch_size: samples of one forward pass. Gradients are accumulated up to ``batch_size``, so it changes
            memory and speed, not the result.
        validation: samples whose loss is measured after every epoch; the best weight is then returned.
        initial: ``(D,)`` weight to start from; None means ones.
        checkpoint: folder that keeps the state every ``save_every`` steps and at the end of an epoch.
        resume: go on from the state in ``checkpoint`` if there is one; the result is that of an uninterrupted run.
        gap_samples: the gap statistics are measured on so many samples, the first ones, after training.
        data: what the samples are, for the record.
        progress: show a bar on stderr.
        on_step: called with the step's number, from 1, and its loss.
    Returns:
        `Scorer` with the model's identity, gap statistics, and as budget the (mean) ratio it was trained for.
    Raises:
        ValueError: on an unsupported model, bad settings, no usable samples, or the state of another run.
        RuntimeError: if the loss is not finite.

    Under torchrun or accelerate (torch.distributed initialised) each rank takes its share of every step's samples; the
    weight is the same on all, bit for bit, and that of one process up to the order of sums.
    """
    chosen = _settings(settings, changes)
    if len(samples) == 0:
        raise ValueError("train_scorer needs samples, got none")
    if micro_batch_size < 1 or (micro_batch_size > 1 and collate is None):
        raise ValueError(f"micro_batch_size must be 1, or more with a collate function, got {micro_batch_size}")
    turns = VisionPruning(text=text, processor=processor).text  # the same checks as for pruning
    frozen = FrozenModel(
        model,
        injection=chosen.injection,
        checkpointing=chosen.gradient_checkpointing,
        turns=turns if isinstance(turns, UserTurns) else None,
    )
    run = _Run(frozen, samples, chosen, collate, micro_batch_size, Ranks.current())
    base = identify(model)
    belongs = {
        **{f"settings.{name}": value for name, value in chosen.to_dict().items()},
        "model": base.fingerprint,
        "text": "all" if frozen.turns is None else "user",
        "samples": len(samples),
    }
    folder = None if checkpoint is None else Path(checkpoint)
    state = None
    if run.ranks.is_first:  # which alone writes states: the others need not share its disk
        if folder is not None and resume:
            state = TrainingState.load(folder, belongs)
        if state is None:
            state = TrainingState.fresh(_initial(initial, frozen)).to("cpu")
    state = run.ranks.share(state).to(frozen.device)

    def save() -> None:
        if folder is not None and run.ranks.is_first:
            state.save(folder, belongs)

    shown = progress and run.ranks.is_first
    with (
        frozen.frozen(),
        progress_bar("training scorer", run.total_steps, shown=shown, done=state.step) as advance,
    ):
        while state.step < run.total_steps and not state.stopped:
            loss = run.step(state)
            if on_step is not None:
                on_step(state.step, loss)
            advance(f"loss {loss:.4g}")
            if state.step % run.steps_an_epoch == 0:
                run.end_epoch(state, validation)
                save()
            elif state.step % save_every == 0:
                save()
        weight = state.best_weight if validation is not None else state.weight
        gaps = run.gaps(weight, gap_samples)
    clamped = float(((weight <= LOWEST) | (weight >= HIGHEST)).float().mean())
    if clamped > CLAMPED_SHARE:
        logger.warning(
            "%.0f%% of the weight sits on a clamp (%g or %g): try a lower learning_rate, fewer epochs or a larger "
            "regularization",
            100 * clamped,
            LOWEST,
            HIGHEST,
        )
    return Scorer(
        weight,
        base,
        UniformBudget(sum(chosen.ratios) / len(chosen.ratios)),
        GapStatistics.of(gaps),
        training={
            "settings": chosen.to_dict(),
            "text": belongs["text"],
            "data": data,
            "samples": len(samples),
            "steps": state.step,
            "stopped_early": state.stopped,
            "first_losses": state.losses[:10],
            "last_losses": state.losses[-10:],
            "evaluations": state.evaluations,
            "clamped_share": clamped,
            "ranks": run.ranks.world,
        },
    )


class _Run:
    """One training run: which samples a step takes, what it does with them."""

    def __init__(
        self,
        frozen: FrozenModel,
        samples: Sequence[Any],
        settings: TrainingSettings,
        collate: Collate | None,
        micro_batch_size: int,
        ranks: Ranks,
    ) -> None:
        self.frozen, self.samples, self.settings, self.ranks = frozen, samples, settings, ranks
        self.collate, self.micro_batch_size = collate, micro_batch_size
        self.steps_an_epoch = -(-len(samples) // settings.batch_size)
        self.total_steps = self.steps_an_epoch * settings.epochs

    def step(self, state: TrainingState) -> float:
        """One optimiser step. Returns its loss: mean distance of the rows plus the regulariser, before the step."""
        epoch, place = divmod(state.step, self.steps_an_epoch)
        random_of_step = random.Random(f"{self.settings.seed}/{state.step}")
        ratio = random_of_step.choice(self.settings.ratios)
        order = list(range(len(self.samples)))
        random.Random(f"{self.settings.seed}/epoch {epoch}").shuffle(order)
        size = self.settings.batch_size
        mine = order[place * size : (place + 1) * size][self.ranks.rank :: self.ranks.world]
        weight = state.weight.detach().requires_grad_()
        totals = torch.zeros(2, dtype=torch.float64, device=weight.device)  # loss and rows
        grad = torch.zeros_like(state.weight)
        for inputs in self._batches([self.samples[i] for i in mine]):
            batch = self.frozen.merge(inputs)
            rows = int(batch.trainable.sum())
            if rows == 0:
                continue
            losses = row_losses(self.frozen, batch, weight, ratio, self.settings)
            grad += torch.autograd.grad(losses.sum(), weight)[0]
            totals += torch.stack([losses.detach().sum().double(), totals.new_tensor(rows)])
        self.ranks.add_up(grad)
        self.ranks.add_up(totals)
        distance, rows = totals.tolist()
        if rows == 0:
            raise ValueError(
                f"no sample of step {state.step + 1} has vision tokens to prune and text to score them against"
            )
        away = state.weight - 1
        loss = distance / rows + self.settings.regularization * float(away.square().sum())
        if not (loss < float("inf") and bool(grad.isfinite().all())):
            raise RuntimeError(
                f"the loss of step {state.step + 1} is {loss} and its gradient may be no number: "
                "train in bfloat16 or float32, or lower the learning rate"
            )
        self._update(state, grad / rows + 2 * self.settings.regularization * away)
        state.losses.append(loss)
        state.epoch_loss += loss
        return loss

    def _update(self, state: TrainingState, grad: torch.Tensor) -> None:
        """AdamW without weight decay, written out so that its state is three plain tensors; then the clamp."""
        state.step += 1
        first, second, epsilon = 0.9, 0.999, 1e-8
        state.exp_avg.lerp_(grad, 1 - first)
        state.exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
        scale = (state.exp_avg_sq / (1 - second**state.step)).sqrt_().add_(epsilon)
        state.weight = (
            state.weight - self.settings.learning_rate / (1 - first**state.step) * state.exp_avg / scale
        ).clamp_(LOWEST, HIGHEST)

    def end_epoch(self, state: TrainingState, validation: Sequence[Any] | None) -> None:
        """Measure, remember the best weight, and decide whether to go on."""
        loss = state.epoch_loss / self.steps_an_epoch
        record = {"step": float(state.step), "train": loss}
        if validation is not None:
            loss = record["validation"] = self.evaluate(state.weight, validation)
        state.evaluations.append(record)
        state.epoch_loss = 0.0
        if loss < state.best_loss:
            state.best_loss, state.bad_evaluations = loss, 0
            state.best_weight = state.weight.clone()
        else:
            state.bad_evaluations += 1
        patience = self.settings.patience
        state.stopped = patience is not None and state.bad_evaluations >= patience

    @torch.no_grad()
    def evaluate(self, weight: torch.Tensor, samples: Sequence[Any]) -> float:
        """Mean loss over samples, at the mean of the ratios."""
        ratio = sum(self.settings.ratios) / len(self.settings.ratios)
        totals = torch.zeros(2, dtype=torch.float64, device=weight.device)
        mine = [samples[i] for i in range(self.ranks.rank, len(samples), self.ranks.world)]
        for inputs in self._batches(mine):
            batch = self.frozen.merge(inputs)
            losses = row_losses(self.frozen, batch, weight, ratio, self.settings)
            totals += torch.stack([losses.sum().double(), batch.trainable.sum().double()])
        distance, rows = self.ranks.add_up(totals).tolist()
        if rows == 0:
            raise ValueError("no validation sample has vision tokens to prune and text to score them against")
        return distance / rows + self.settings.regularization * float((weight - 1).square().sum())

    def gaps(self, weight: torch.Tensor, most: int) -> torch.Tensor:
        """Gaps of the first ``most`` samples; no decoder work."""
        places = range(self.ranks.rank, min(most, len(self.samples)), self.ranks.world)
        found = [
            batch_gaps(self.frozen.merge(inputs), weight) for inputs in self._batches([self.samples[i] for i in places])
        ]
        return self.ranks.gather(torch.cat(found) if found else weight.new_empty(0))

    def _batches(self, samples: list[Any]) -> Any:
        for start in range(0, len(samples), self.micro_batch_size):
            part = samples[start : start + self.micro_batch_size]
            inputs = part[0] if self.collate is None else self.collate(part)
            if not isinstance(inputs, Mapping):
                raise ValueError(
                    f"a sample must be a mapping of model inputs, got {type(inputs).__name__}; pass collate to make one"
                )
            yield inputs


def _settings(settings: TrainingSettings | str, changes: dict[str, Any]) -> TrainingSettings:
    if isinstance(settings, str):
        return TrainingSettings.named(settings, **changes)
    if not isinstance(settings, TrainingSettings):
        raise ValueError(f"settings must be TrainingSettings, 'default' or 'paper', got {settings!r}")
    return TrainingSettings(**{**vars(settings), **changes})


def _initial(initial: torch.Tensor | None, frozen: FrozenModel) -> torch.Tensor:
    if initial is None:
        return torch.ones(frozen.width, device=frozen.device)
    if initial.shape != (frozen.width,):
        raise ValueError(f"initial must have the model's width ({frozen.width},), got {tuple(initial.shape)}")
    return fp32_weight("initial", initial).to(frozen.device).clamp(LOWEST, HIGHEST)


__all__ = ["train_scorer"]
