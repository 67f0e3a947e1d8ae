"""`train_scorer`: learn the weight of Eq. 1 from what pruning does to the model's last hidden states.

Two passes of the frozen model a sample: as it is, and with a soft mask on its vision keys that depends on the weight;
with ``masked_rows="text"`` the second one over the text tokens alone. Only the weight learns. Source: section 3.2,
Eq. 4, appendices C and D of arXiv:2605.29535.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.settings.identity import identify
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.scorer import GapStatistics, Scorer
from asymvlm.settings.weights import fp32_weight
from asymvlm.tokens.user_turns import UserTurns
from asymvlm.training.passes import FrozenModel
from asymvlm.training.progress import progress_bar
from asymvlm.training.ranks import Ranks
from asymvlm.training.run import Collate, Run, TrainingInterrupted
from asymvlm.training.settings import CLAMPED_SHARE, HIGHEST, LOWEST, TrainingSettings
from asymvlm.training.state import TrainingState
from asymvlm_kernels import UniformBudget

logger = logging.getLogger(__name__)


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
    save_seconds: float = 60.0,
    gap_samples: int = 512,
    data: str = "",
    record: Mapping[str, Any] | None = None,
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
        checkpoint: folder that keeps the state: from the beginning, every ``save_every`` steps or ``save_seconds``, at
            the end of an epoch, and where Ctrl-C ends the run.
        resume: go on from the state in ``checkpoint`` if there is one; the result is that of an uninterrupted run.
        gap_samples: the gap statistics are measured on so many samples, the first ones, after training.
        data: what the samples are, for the record.
        record: more plain values to store with the scorer.
        progress: show a bar on stderr.
        on_step: called with the step's number, from 1, and its loss.
    Returns:
        `Scorer` with the model's identity, gap statistics, and as budget the (mean) ratio it was trained for.
    Raises:
        ValueError: on an unsupported model, bad settings, no usable samples, the state of another run, or where text
            rows cannot run by themselves (recurrent layers, attention in chunks) and ``masked_rows`` is ``"text"``.
        RuntimeError: if the loss is not finite.
        OSError: before the first step, if ``checkpoint`` cannot be written.
        TrainingInterrupted: a KeyboardInterrupt that says how far the run got.

    Under torchrun or accelerate (torch.distributed initialised) each rank takes its share of every step's samples; the
    weight is the same on all, bit for bit, and that of one process up to the order of sums.
    """
    chosen = _settings(settings, changes)
    if len(samples) == 0:
        raise ValueError("train_scorer needs samples, got none")
    if micro_batch_size < 1 or (micro_batch_size > 1 and collate is None):
        raise ValueError(f"micro_batch_size must be 1, or more with a collate function, got {micro_batch_size}")
    if save_every < 1:
        raise ValueError(f"save_every must be 1 step or more, got {save_every}")
    turns = VisionPruning(text=text, processor=processor).text  # the same checks as for pruning
    frozen = FrozenModel(
        model,
        injection=chosen.injection,
        checkpointing=chosen.gradient_checkpointing and chosen.masked_rows == "all",
        turns=turns if isinstance(turns, UserTurns) else None,
    )
    run = Run(frozen, samples, chosen, collate, micro_batch_size, Ranks.current())
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

    def save(state: TrainingState) -> None:
        if folder is not None and run.ranks.is_first:
            state.save(folder, belongs)

    shown = progress and run.ranks.is_first
    with (
        frozen.frozen(),
        progress_bar("training scorer", run.total_steps, shown=shown, done=state.step) as advance,
    ):

        def told(step: int, loss: float) -> None:
            if on_step is not None:
                on_step(step, loss)
            advance(f"loss {loss:.4g}")

        state = run.train(state, validation, None if folder is None else save, save_every, save_seconds, told)
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
            **(record or {}),
        },
    )


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


__all__ = ["TrainingInterrupted", "train_scorer"]
