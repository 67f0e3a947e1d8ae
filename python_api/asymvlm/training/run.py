"""One training run: which samples a step takes, and how it moves the weight. Every step makes a new state."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from asymvlm.training.passes import FrozenModel
from asymvlm.training.ranks import Ranks
from asymvlm.training.rows import check_text_rows
from asymvlm.training.scoring import batch_gaps, row_losses
from asymvlm.training.settings import HIGHEST, LOWEST, TrainingSettings
from asymvlm.training.state import TrainingState

Collate = Callable[[list[Any]], Mapping[str, Any]]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C in `train_scorer`; the message says how far it got, and whether it can go on."""


class Run:
    """Samples, settings and ranks of one run."""

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
        self.checked = settings.masked_rows == "all"
        self.steps_an_epoch = -(-len(samples) // settings.batch_size)
        self.total_steps = self.steps_an_epoch * settings.epochs

    def train(
        self,
        state: TrainingState,
        validation: Sequence[Any] | None,
        save: Callable[[TrainingState], None] | None,
        save_every: int,
        save_seconds: float,
        told: Callable[[int, float], None],
    ) -> TrainingState:
        """Step by step to the end; ``told`` hears of each step and its loss, ``save`` keeps states on the way.

        Raises:
            TrainingInterrupted: on Ctrl-C, after the last whole state was saved.
        """
        keep = save or (lambda state: None)
        if not self.is_over(state):
            keep(state)  # a folder that cannot be written is found now
        saved = time.monotonic()
        try:
            while not self.is_over(state):
                if self.epoch_is_over(state):
                    state = self.end_epoch(state, validation)
                    keep(state)
                    continue
                state = self.step(state)
                told(state.step, state.losses[-1])
                if state.step % save_every == 0 or time.monotonic() - saved > save_seconds:
                    keep(state)
                    saved = time.monotonic()
        except KeyboardInterrupt as interrupt:
            keep(state)
            kept = "" if save is None else "; the same command goes on from there"
            raise TrainingInterrupted(f"interrupted after step {state.step} of {self.total_steps}{kept}") from interrupt
        return state

    def epoch_is_over(self, state: TrainingState) -> bool:
        """Whether the last step was an epoch's last, and the epoch was not judged yet."""
        return state.step > 0 and len(state.evaluations) < state.step // self.steps_an_epoch

    def is_over(self, state: TrainingState) -> bool:
        return (state.step >= self.total_steps or state.stopped) and not self.epoch_is_over(state)

    def step(self, state: TrainingState) -> TrainingState:
        """One optimiser step. Its loss: mean distance of the rows plus the regulariser, before the step.

        The state given stays as it is, so that an interruption leaves a whole one behind.
        """
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
            if not self.checked:
                check_text_rows(self.frozen, batch)
                self.checked = True
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
        moved = self._update(state, grad / rows + 2 * self.settings.regularization * away)
        return dataclasses.replace(moved, losses=[*state.losses, loss], epoch_loss=state.epoch_loss + loss)

    def _update(self, state: TrainingState, grad: torch.Tensor) -> TrainingState:
        """AdamW without weight decay, written out so that its state is three plain tensors; then the clamp."""
        step = state.step + 1
        first, second, epsilon = 0.9, 0.999, 1e-8
        exp_avg = state.exp_avg.lerp(grad, 1 - first)
        exp_avg_sq = (state.exp_avg_sq * second).addcmul_(grad, grad, value=1 - second)
        scale = (exp_avg_sq / (1 - second**step)).sqrt_().add_(epsilon)
        weight = (state.weight - self.settings.learning_rate / (1 - first**step) * exp_avg / scale).clamp_(
            LOWEST, HIGHEST
        )
        return dataclasses.replace(state, step=step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, weight=weight)

    def end_epoch(self, state: TrainingState, validation: Sequence[Any] | None) -> TrainingState:
        """Measure, remember the best weight, and decide whether to go on."""
        loss = state.epoch_loss / self.steps_an_epoch
        record = {"step": float(state.step), "train": loss}
        if validation is not None:
            loss = record["validation"] = self.evaluate(state.weight, validation)
        better = loss < state.best_loss
        bad = 0 if better else state.bad_evaluations + 1
        patience = self.settings.patience
        return dataclasses.replace(
            state,
            evaluations=[*state.evaluations, record],
            epoch_loss=0.0,
            best_loss=min(loss, state.best_loss),
            best_weight=state.weight.clone() if better else state.best_weight,
            bad_evaluations=bad,
            stopped=patience is not None and bad >= patience,
        )

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
