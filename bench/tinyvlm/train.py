"""Train the small VLM: ``python -m bench.tinyvlm.train --out DIR``, a quarter of an hour on one CPU core.

Three stages: the tower and the embeddings meet (align), look-up is learned on short pages with half of the tokens
(read), everything on all pages with 72, 108 or 144 of 144 tokens (mix). ``DIR`` gets a ``save_pretrained`` folder and
``training.jsonl``; ``--resume`` goes on from the last saved step and gives the same weights, bit for bit, as a run
that was never stopped (same machine, same number of threads).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asymvlm.app.session import InputError
from asymvlm.cli import console
from bench.tinyvlm.batches import FIRST_MIX, MIX, Batch, make_batch
from bench.tinyvlm.evaluate import exact_match_by_kind, make_samples
from bench.tinyvlm.glyphs import VOCABULARY
from bench.tinyvlm.losses import Supervision, alignment_loss, all_losses
from bench.tinyvlm.model import NUM_VISION, build, build_processor, to_model_pixels, vision_features
from bench.tinyvlm.pages import make_pages

STATE, LOG = "training_state.pt", "training.jsonl"
BETAS, DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
LAST_RATE = 0.05  # of the peak learning rate, where the cosine ends
SAVE_EVERY, LOG_EVERY = 100, 25
CHECKED = 300  # validation pages looked at after each stage


@dataclass(frozen=True)
class Stage:
    """One part of training. ``kept`` maps numbers of vision tokens to how often they are drawn."""

    name: str
    steps: int
    batch: int
    rate: float
    entries: tuple[int, int] = (3, 12)
    first_most: int = 12  # most entries on a page at the start; it grows to ``entries[1]`` until the end of the stage
    kept: dict[int, float] = field(default_factory=lambda: {NUM_VISION: 1.0})
    mix: dict[str, float] = field(default_factory=lambda: MIX)
    look_weight: float = 0.0
    warmup: int = 100
    align_only: bool = False  # tower, projector and embeddings by the alignment alone

    def learning_rate(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1, (step + 1) / self.warmup) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def batch_of(self, seed: int, step: int) -> Batch:
        """The batch of a step, a function of seed, stage and step alone: nothing to store for a resume."""
        key = [seed, sum(self.name.encode()), step]
        rng = np.random.default_rng([*key, 2])
        grown = (self.entries[1] - self.first_most) * step // self.steps
        kept = int(rng.choice(list(self.kept), p=list(self.kept.values())))
        return make_batch(key, self.batch, (self.entries[0], self.first_most + grown), kept, self.mix)


STAGES = (
    Stage("align", 400, 32, 2e-3, entries=(4, 12), warmup=50, align_only=True),
    Stage("read", 600, 16, 1.5e-3, first_most=8, kept={72: 1.0}, mix=FIRST_MIX, look_weight=0.5),
    Stage("mix", 1200, 16, 1.3e-3, kept={72: 0.35, 108: 0.25, NUM_VISION: 0.4}, look_weight=0.2),
)


class Training:
    """Model, optimizer and place in the plan; everything that a saved state holds.

    A subclass that trains on other data has its own ``vocabulary``, `fresh`, `losses` and `check`.
    """

    vocabulary: ClassVar[tuple[str, ...]] = VOCABULARY
    extra: Any  # parameters that only training has

    def __init__(self, out: Path, seed: int, stages: tuple[Stage, ...]) -> None:
        self.out, self.seed, self.stages = out, seed, stages
        self.model, self.extra = self.fresh()
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.optimizer = self._new_optimizer()

    def fresh(self) -> tuple[Any, Any]:
        """Model and parameters of training alone, as they are before the first step."""
        model = build(seed=self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            extra = Supervision(model.config.text_config.hidden_size)
        match_norms(model, make_pages(5, 8, "train").pixels)
        return model, extra

    def losses(self) -> tuple[torch.Tensor, dict[str, float]]:
        """What this step lowers, and the figures of its log record."""
        stage = self.current
        batch = stage.batch_of(self.seed, self.step)
        if stage.align_only:
            loss = alignment_loss(self.model, self.extra, vision_features(self.model, batch.pixels), batch.meaning)
            return loss, {"alignment": loss.item()}
        terms = all_losses(self.model, self.extra, batch)
        record = {
            "answer": terms.answer.item(),
            "alignment": terms.alignment.item(),
            "look": terms.look.item(),
            "right": share_right(terms.predicted, batch.labels),
        }
        return terms.answer + terms.alignment + stage.look_weight * terms.look, record

    def check(self) -> dict[str, float]:
        """Exact match by kind on validation samples with all vision tokens, the model being in evaluation mode."""
        return exact_match_by_kind(self.model, make_samples("validation", CHECKED, seed=self.seed))

    @property
    def current(self) -> Stage:
        return self.stages[self.stage]

    def _new_optimizer(self) -> torch.optim.AdamW:
        modules = [self.model, self.extra]
        if self.current.align_only:
            inner = self.model.model
            modules = [inner.vision_tower, inner.multi_modal_projector, self.model.get_input_embeddings(), self.extra]
        every = {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()
        decayed = [parameter for parameter in every if parameter.ndim >= 2 and not self.current.align_only]
        chosen = {id(parameter) for parameter in decayed}
        rest = [parameter for parameter in every if id(parameter) not in chosen]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=self.current.rate, betas=BETAS)

    def advance(self) -> dict[str, float]:
        """One step; returns its losses and the share of answer tokens that were right."""
        stage, start = self.current, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate(self.step)
        loss, record = self.losses()
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return record

    def next_stage(self) -> None:
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(self.stages):
            self.optimizer = self._new_optimizer()

    def save(self) -> None:
        """Write the state beside its place and rename it: an interrupted save leaves the last one whole."""
        state = {
            "seed": self.seed,
            "plan": [repr(stage) for stage in self.stages],
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "extra": self.extra.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.out / f"{STATE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / STATE)

    def restore(self) -> None:
        """Go on from the saved state.

        Raises:
            InputError: if there is none, or it is of another seed or plan.
        """
        file = self.out / STATE
        if not file.is_file():
            raise InputError(f"--resume: {file} does not exist, wanted the folder of an interrupted run")
        state = torch.load(file, weights_only=True)
        for name, wanted in (("seed", self.seed), ("plan", [repr(stage) for stage in self.stages])):
            if state[name] != wanted:
                raise InputError(f"--resume: {file} was made with {name} {state[name]}, this run has {wanted}")
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.extra.load_state_dict(state["extra"])
        if self.stage < len(self.stages):
            self.optimizer = self._new_optimizer()
            self.optimizer.load_state_dict(state["optimizer"])


def run(training: Training) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Train to the end, logging and saving; yields the number of steps done and, now and then, a log record."""
    recent: list[dict[str, float]] = []
    done = sum(stage.steps for stage in training.stages[: training.stage]) + training.step
    training.model.train()
    while training.stage < len(training.stages):
        stage = training.current
        recent.append(training.advance())
        done += 1
        finished = training.step == stage.steps
        record = None
        if training.step % LOG_EVERY == 0 or finished:
            means = {name: round(float(np.mean([entry[name] for entry in recent])), 4) for name in recent[-1]}
            record = {"stage": stage.name, "step": training.step, "seconds": round(training.seconds, 1), **means}
            recent = []
        if finished and not stage.align_only:
            record = {**(record or {}), "exact_match": _checked(training)}
        if record is not None:
            with (training.out / LOG).open("a") as log:
                log.write(json.dumps(record) + "\n")
        if finished:
            training.next_stage()
        if finished or training.step % SAVE_EVERY == 0:
            training.save()
        yield done, record
    training.model.eval()


def _checked(training: Training) -> dict[str, float]:
    training.model.eval()
    rates = training.check()
    training.model.train()
    return {kind: round(rate, 3) for kind, rate in rates.items()}


def share_right(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of answer tokens that are the most likely ones."""
    return (predicted == labels)[labels >= 0].float().mean().item()


@torch.no_grad()
def match_norms(model: Any, pages: np.ndarray) -> None:
    """Scale the projector so that vision tokens of ``pages`` start as long as word embeddings."""
    pixels = to_model_pixels(pages)
    embeddings = model.get_input_embeddings().weight.norm(dim=-1).mean()
    ratio = embeddings / vision_features(model, pixels).norm(dim=-1).mean()
    last = model.model.multi_modal_projector.linear_2
    last.weight.mul_(ratio)
    last.bias.mul_(ratio)


def save_checkpoint(model: Any, folder: Path, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """Model, processor, tokenizer and chat template, loadable by the auto classes."""
    model.save_pretrained(folder)
    build_processor(vocabulary).save_pretrained(folder)


def train(kind: type[Training], out: Path, seed: int, stages: tuple[Stage, ...], *, resume: bool) -> None:
    """A run from its beginning, or from its last save, to the checkpoint in ``out``, with a bar on the terminal.

    Raises:
        InputError: if ``out`` holds a run already, or ``resume`` finds none to go on with.
    """
    if not resume and (out / LOG).exists():
        raise InputError(f"--out {out} holds a training run already, wanted an empty folder or --resume")
    out.mkdir(parents=True, exist_ok=True)
    training = kind(out, seed, stages)
    if resume:
        training.restore()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err) as progress:
        bar = progress.add_task("training", total=sum(stage.steps for stage in stages))
        for done, record in run(training):
            progress.update(bar, completed=done)
            if record is not None:
                progress.console.print(json.dumps(record), markup=False, soft_wrap=True)
    save_checkpoint(training.model, out, kind.vocabulary)
    (out / STATE).unlink(missing_ok=True)
    console.out.print(f"wrote {out}: {training.seconds / 60:.1f} minutes of training", markup=False)


def shortened(stages: tuple[Stage, ...], scale: float) -> tuple[Stage, ...]:
    """The same plan with ``scale`` times as many steps in every stage."""
    return tuple(replace(stage, steps=max(1, round(stage.steps * scale))) for stage in stages)


def command(kind: type[Training], stages: tuple[Stage, ...], said: str) -> typer.Typer:
    """The command line of a training by a plan; ``said`` is what its help begins with."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=said)
    def main(
        out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the log and the state.")],
        seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved step.")] = False,
        threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves its own choice.")] = 0,
        scale: Annotated[float, typer.Option(min=0.001, help="Steps of every stage, a multiple of the plan's.")] = 1.0,
    ) -> None:
        console.hush_transformers(progress=False)
        if threads:
            torch.set_num_threads(threads)
        train(kind, out, seed, shortened(stages, scale), resume=resume)

    return app


if __name__ == "__main__":
    app = command(Training, STAGES, "Train the small VLM from scratch.")
    sys.exit(console.run_app(app, None, name="python -m bench.tinyvlm.train"))
