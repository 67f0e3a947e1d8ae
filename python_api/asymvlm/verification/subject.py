"""The model under test, its unpatched run, and how far that run is from itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.decoder import decoder_of
from asymvlm.models.adapter import Adapter
from asymvlm.policies import TextEviction, VisionPruning
from asymvlm.verification import samples
from asymvlm.verification.closed import ClosedColumns, reference_kind
from asymvlm.verification.measure import NOISE_LIMIT, floor, hidden_apart, logits_apart
from asymvlm.verification.report import FAIL, PASS, CheckRow
from asymvlm.verification.runs import Run, masked_run, run

EVICTION_STEPS = 24


@dataclass
class Noise:
    """Differences of the unpatched model from itself: the largest so far of each kind."""

    hidden: float = 0.0
    first: float = 0.0
    steps: float = 0.0  # over all steps behind the first
    again: float = 0.0  # run twice alike, any kind

    def add(self, found: Run, wanted: Run, places: torch.Tensor) -> float:
        """Count a run. ``places`` ``(B, S)`` of ``wanted`` whose hidden states count. The largest difference."""
        columns = found.hidden.shape[1] - wanted.hidden.shape[1]
        apart = Noise(
            hidden_apart(found.hidden[:, columns:][places], wanted.hidden[places]),
            logits_apart(found.logits[:, :1], wanted.logits[:, :1]),
            logits_apart(found.logits[:, 1:], wanted.logits[:, 1:]),
        )
        for name in ("hidden", "first", "steps"):
            setattr(self, name, max(getattr(self, name), getattr(apart, name)))
        return max(apart.hidden, apart.first, apart.steps)


@dataclass(eq=False)
class Subject:
    """What every check is given."""

    model: Any
    adapter: Adapter
    vision: VisionPruning
    text: TextEviction | None
    sample: samples.Sample
    steps: int
    tell: Callable[[str], None]
    base: Run = field(init=False)
    noise: Noise = field(init=False, default_factory=Noise)
    floor: float = field(init=False)

    def __post_init__(self) -> None:
        decoder: Any = decoder_of(self.model)
        self.floor = floor(self.model, len(decoder.layers))

    @property
    def real(self) -> torch.Tensor:
        """``(B, S)`` bool: tokens that are no padding."""
        return self.sample["attention_mask"].bool()

    def run_unpatched(self) -> None:
        """The run that the others are compared with.

        Raises:
            ValueError: if the model cannot run the inputs at all.
        """
        self.tell("the unpatched model")
        try:
            self.base = run(self.model, self.sample, max(self.steps, EVICTION_STEPS))
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            raise ValueError(f"the unpatched model cannot run these inputs: {type(error).__name__}: {error}") from error

    def measure_noise(self) -> list[CheckRow]:
        """The model against itself: run again, behind one more padding column, and with a dense mask that is all open."""
        self.tell("the unpatched model against itself")
        base, steps = self.base, self.base.tokens.shape[1]
        again = run(self.model, self.sample, steps, forced=base.tokens)
        self.noise.again = self.noise.add(again, base, self.real)
        padded = samples.left_padded(self.model, self.adapter, self.sample, 1)
        moved = self.noise.add(run(self.model, padded, steps, forced=base.tokens), base, self.real)
        everything = ClosedColumns([torch.ones_like(self.real)])
        dense = self.noise.add(
            masked_run(self.model, self.sample, steps, everything, base.tokens), base, self.real
        )  # in its own attention, or in the one the masked runs use for want of dense masks
        found, limit = max(self.noise.again, moved, dense), NOISE_LIMIT * self.floor
        note = (
            f"run again {self.noise.again:.1e}, one more padding column {moved:.1e}, a dense mask with nothing closed in "
            f"{reference_kind(self.model)} attention {dense:.1e}"
        )
        if not found <= limit:
            note += ": too far apart for any check to say much; try float32, or attn_implementation 'sdpa' or 'eager'"
        return [CheckRow("unpatched against itself", PASS if found <= limit else FAIL, None, found, limit, note)]
