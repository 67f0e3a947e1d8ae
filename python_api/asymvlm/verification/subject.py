"""The model under test, its unpatched run, and how far that run is from itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.models.adapter import Adapter
from asymvlm.settings.eviction import TextEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.verification import samples
from asymvlm.verification.closed import ClosedColumns, reference_kind
from asymvlm.verification.measure import NOISE_LIMIT, NOISE_MOST, floor, hidden_apart, logits_apart
from asymvlm.verification.names import decoder_of
from asymvlm.verification.report import FAIL, PASS, CheckRow
from asymvlm.verification.runs import Run, masked_run, run

EVICTION_STEPS = 24
PADDING = (1, 6)  # columns more: tiles of matrix products and attention then begin elsewhere


@dataclass
class Noise:
    """The unpatched model's largest differences from itself so far, of hidden states and of logits at any step."""

    hidden: float = 0.0
    logits: float = 0.0

    def add(self, found: Run, wanted: Run, places: torch.Tensor) -> float:
        """Count a run, and return its larger difference. ``places`` ``(B, S)`` of ``wanted``: tokens that count."""
        columns = found.hidden.shape[1] - wanted.hidden.shape[1]
        hidden = hidden_apart(found.hidden[:, columns:][places], wanted.hidden[places])
        logits = logits_apart(found.logits, wanted.logits)
        self.hidden, self.logits = max(self.hidden, hidden), max(self.logits, logits)
        return max(hidden, logits)

    @property
    def largest(self) -> float:
        return max(self.hidden, self.logits)


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
    base: Run = field(init=False, repr=False)
    noise: Noise = field(init=False, default_factory=Noise)
    again: float = field(init=False, default=0.0)  # of `noise`, what running twice alike makes
    floor: float = field(init=False)
    pair: list[samples.Sample] | None = field(init=False, default=None)  # the sample and another one, for a batch

    def __post_init__(self) -> None:
        decoder: Any = decoder_of(self.model)
        self.floor = floor(self.model, len(decoder.layers))
        if len(self.real) == 1:
            self.pair = [self.sample, samples.second_sample(self.model, self.adapter, self.sample)]

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
        """The model against itself: run again, padded otherwise, in a batch, and with a dense mask that is all open."""
        self.tell("the unpatched model against itself")
        base, steps = self.base, self.base.tokens.shape[1]
        self.again = self.noise.add(run(self.model, self.sample, steps, forced=base.tokens), base, self.real)
        parts = {"run again": self.again}
        for more in PADDING:
            padded = samples.left_padded(self.model, self.adapter, self.sample, more)
            parts[f"{more} more padding columns"] = self.noise.add(
                run(self.model, padded, steps, forced=base.tokens), base, self.real
            )
        everything = ClosedColumns([torch.ones_like(self.real)])
        masked = masked_run(self.model, self.sample, steps, everything, base.tokens)
        # in the decoder's own attention, or in the one that the masked runs use for want of dense masks
        parts[f"a dense mask in {reference_kind(self.model)} attention"] = self.noise.add(masked, base, self.real)
        if self.pair is not None:
            parts["in a batch of two"] = self._noise_of_a_batch(self.pair)
        largest, limit = max(parts.values()), min(NOISE_LIMIT * self.floor, NOISE_MOST)
        note = ", ".join(f"{name} {value:.1e}" for name, value in parts.items())
        if not largest <= limit:
            note += (
                ": too far apart to verify anything; in float32 look for inputs that are missing, like token types, "
            )
            note += "in a shorter type try float32"
        return [CheckRow("unpatched against itself", PASS if largest <= limit else FAIL, None, largest, limit, note)]

    def _noise_of_a_batch(self, pair: list[samples.Sample]) -> float:
        steps = self.base.tokens.shape[1]
        second = run(self.model, pair[1], steps)
        batch = samples.collated(self.model, self.adapter, pair)
        whole = run(self.model, batch, steps, forced=torch.cat([self.base.tokens, second.tokens]))
        singles = zip((self.base, second), pair)
        found = [self.noise.add(whole.row(n), run, x["attention_mask"].bool()) for n, (run, x) in enumerate(singles)]
        return max(found)
