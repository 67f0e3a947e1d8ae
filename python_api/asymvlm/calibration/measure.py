"""What calibration measures: scores and gaps of every row, and the task metric under budgets, kept on disk if asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asymvlm.files.json_files import FileError, parse, read_lines
from asymvlm.patch import PatchHandle, patch
from asymvlm.prompt.background import background_tokens
from asymvlm.report.crowded import silence
from asymvlm.settings.budget_file import AnyBudget, budget_to_dict
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.scorer import Scorer
from asymvlm.tokens.user_turns import UserTurns
from asymvlm.training.passes import FrozenModel
from asymvlm.training.scoring import weighted_scores
from asymvlm_kernels import AtLeastRelevant, Spread

Metric = Callable[[Any, Any], Any]  # (model, sample) -> a number, or one for each row of the sample
FILE = "measurements.jsonl"


class Rows:
    """Rows of all samples that have something to prune, in order. Everything is on the CPU."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []  # (N,) fp32, of the tokens that the budget rules over
        self.gaps: list[float] = []
        self.relevant: list[float] = []  # share of the tokens that look relevant, before scores spread
        self.usable: list[list[bool]] = []  # by sample and row

    @property
    def num_tokens(self) -> torch.Tensor:
        """``(n,)`` int64."""
        return torch.tensor([len(scores) for scores in self.scores])

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``(n, N)`` and mask ``(n, N)``."""
        scores = torch.nn.utils.rnn.pad_sequence(self.scores, batch_first=True)
        return scores, torch.arange(scores.shape[1]) < self.num_tokens[:, None]


class Measurer:
    """Runs the metric on a pruned model, once for each pair of sample and budget."""

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        samples: Sequence[Mapping[str, Any]],
        metric: Metric,
        text: UserTurns | None,
        folder: Path | None,
        spread: Spread | None = None,
        background: int = 0,
    ) -> None:
        self.model, self.scorer, self.samples, self.metric = model, scorer, samples, metric
        self.spread, self.background = spread, background
        self.frozen = FrozenModel(model, turns=text)
        self.text: UserTurns | str = "all" if text is None else text
        self.file = None if folder is None else folder / FILE
        self.known: dict[tuple[int, str], list[float]] = {}
        self.rows = Rows()
        self._read()

    def _header(self) -> dict[str, Any]:
        weight = [float(self.scorer.weight.sum()), float(self.scorer.weight.square().sum())]
        spread = {} if self.spread is None else {"spread": dataclasses.asdict(self.spread)}
        background = {"background": self.background} if self.background else {}
        return (
            spread
            | background
            | {
                "model": self.scorer.base.fingerprint,
                "weight": weight,
                "samples": len(self.samples),
                "text": "all" if isinstance(self.text, str) else "user",
            }
        )

    def _read(self) -> None:
        if self.file is None:
            return
        if not self.file.is_file():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self._header()) + "\n", encoding="utf-8")
            return
        if not (found := [*read_lines(self.file)]):
            raise FileError(f"{self.file}: the file is empty, wanted measurements: remove it to start over")
        (where, header), *lines = found
        if parse(header, where) != self._header():
            raise ValueError(f"{self.file} holds measurements of another run: {header} found, {self._header()} wanted")
        for where, line in lines:
            try:
                record = parse(line, where)
                values = [float(value) for value in record["values"]]
                self.known[record["sample"], record["budget"]] = values
            except (KeyError, TypeError, ValueError):  # cut short: what follows is measured again
                break

    def look(self) -> Iterator[int]:
        """Scores and gaps of every sample; yields the number of each."""
        weight = self.scorer.weight.to(self.frozen.device)
        for number, sample in enumerate(self.samples):
            batch = self.frozen.merge(sample)
            with torch.no_grad():
                own = scores = weighted_scores(batch, weight)
                relevant = AtLeastRelevant().relevant(own, batch.prunable) / batch.prunable.sum(-1)
                if self.spread is not None:
                    scores = self.spread.apply(scores, batch.lines)
            ruled = batch.prunable & ~background_tokens(scores, batch.prunable, self.background)
            self.rows.usable.append((batch.trainable & ruled.any(-1)).tolist())
            for row, usable in enumerate(self.rows.usable[-1]):
                if usable:
                    self.rows.relevant.append(float(relevant[row]))
                    self.rows.scores.append(scores[row, ruled[row]].cpu())
            yield number

    def measure(self, budget: AnyBudget) -> Iterator[list[float]]:
        """The metric of the usable rows of each sample, in order."""
        name = json.dumps(budget_to_dict(budget))
        with patch(self.model, self._vision(budget, self.text)) as handle:
            for number, sample in enumerate(self.samples):
                values = self.known.get((number, name))
                if values is None:
                    values = self._run(handle, budget, sample, len(self.rows.usable[number]))
                    self.known[number, name] = values
                    if self.file is not None:
                        with self.file.open("a", encoding="utf-8") as file:
                            file.write(json.dumps({"sample": number, "budget": name, "values": values}) + "\n")
                yield [value for value, usable in zip(values, self.rows.usable[number], strict=True) if usable]

    def _vision(self, budget: AnyBudget, text: UserTurns | str | torch.Tensor) -> VisionPruning:
        bare = self.scorer.replace(budget=None, calibration={})  # what an earlier calibration says is no matter here
        vision = VisionPruning(bare, budget, text, spread=self.spread, background=self.background)
        silence(vision)
        return vision

    @torch.no_grad()
    def _run(self, handle: PatchHandle, budget: AnyBudget, sample: Mapping[str, Any], rows: int) -> list[float]:
        if sample.get("labels") is not None or sample.get("text_mask") is not None:
            # a teacher-forced answer is not scored against, in calibration as in training
            text = self.frozen.merge(sample).text
            handle.vision = self._vision(budget, text)
        found = self.metric(self.model, sample)
        values = found.tolist() if isinstance(found, torch.Tensor) else found
        values = [float(value) for value in (values if isinstance(values, (list, tuple)) else [values])]
        if len(values) != rows or not all(abs(value) < float("inf") for value in values):
            raise ValueError(f"the metric must give one finite number for each of the {rows} rows, got {values}")
        return values
