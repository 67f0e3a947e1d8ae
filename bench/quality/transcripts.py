"""Text eviction within one long answer: which generated tokens, or which of the prompt's too, can be spared.

Every method is a call of `generate` on a patched model. Of one threshold and retention they all give up the same number
of tokens at every step, so they hold equal bytes. ``prompt protected`` says whether images and questions may go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import asymvlm
from asymvlm import TextEviction
from asymvlm.methods import CachedMethod, LastRow, OldestFirst, RandomEviction
from bench.quality.scorers import model_inputs
from bench.quality.statistics import paired, rate, record
from bench.tinyvlm.evaluate import ROWS, Samples, make_samples
from bench.tinyvlm.model import NUM_VISION

SCORES = ("attention", "attention of all layers", "oldest first", "random")
RETENTIONS = (0.9, 0.75, 0.5)
THRESHOLD, RECENT = 24, 6  # of a transcript of up to 72 tokens
SINKS = 4  # first tokens that StreamingLLM keeps


@dataclass(frozen=True)
class Chooser:
    """How tokens are picked: by which score, the ``recent`` newest never, the prompt never or as well."""

    score: str = "attention"
    protected: bool = True
    recent: int = 0

    @property
    def name(self) -> str:
        guard = f", {self.recent} recent kept" if self.recent else ""
        return f"{self.score}{guard}, prompt {'protected' if self.protected else 'not protected'}"

    @property
    def method(self) -> CachedMethod:
        if self.score == "oldest first":
            return OldestFirst(sinks=None if self.protected else SINKS)
        kind = RandomEviction if self.score == "random" else LastRow
        return kind(sinks=None if self.protected else 0)

    def policy(self, retention: float, threshold: int = THRESHOLD) -> TextEviction:
        """The library's settings for it."""
        layers = "all" if self.score == "attention of all layers" else "last"
        return TextEviction(threshold, retention, recent=self.recent, layers=layers, method=self.method)


CHOOSERS = (
    *(Chooser(score, protected) for protected in (True, False) for score in SCORES),
    Chooser("attention", recent=RECENT),
    Chooser("attention of all layers", recent=RECENT),
)


def transcribe(model: Any, samples: Samples, policy: TextEviction | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``(B, T)`` after the samples' questions, T the longest answer and its end of text, and how many
    tokens each row gave up, ``(B,)``. A row that has said its end of text goes on.
    """
    parts, evicted = [], []
    with asymvlm.patch(model, vision=1.0, text=policy) as handle:
        for rows in torch.arange(len(samples)).split(ROWS):
            inputs = model_inputs(samples, rows.tolist(), answers=False)
            prompt = inputs["input_ids"].shape[1]
            steps = 1 + NUM_VISION + samples.text.shape[1] - prompt
            output = model.generate(**inputs, max_new_tokens=steps, eos_token_id=None, do_sample=False)
            parts.append(output[:, prompt:])
            assert handle.last is not None
            done = handle.last.eviction
            evicted.append(torch.tensor([0] * len(rows) if done is None else done.evicted))
    return torch.cat(parts), torch.cat(evicted)


def transcript_samples(count: int, *, seed: int = 0) -> Samples:
    """Pages of ten to twelve entries to be read out in full: 60 to 72 tokens. Their questions are of one length."""
    return make_samples("test", count, seed=seed, mix={"read": 1.0}, entries=(10, 12))


def transcripts(model: Any, samples: Samples, retentions: tuple[float, ...] = RETENTIONS) -> dict[str, Any]:
    """Exact match and share of right tokens, by what goes and how much of the threshold stays."""
    truth = samples.labels[:, int(samples.question.sum(1)[0]) :]
    wanted = truth >= 0

    def judge(policy: TextEviction | None) -> tuple[np.ndarray, np.ndarray]:
        hit = transcribe(model, samples, policy)[0] == truth
        return (hit | ~wanted).all(1).numpy(), (hit & wanted).sum(1).div(wanted.sum(1)).numpy()

    result: dict[str, Any] = {"threshold": THRESHOLD, "full": _both(*judge(None)), "rates": {}, "paired": []}
    for retention in retentions:
        judged = {chooser: judge(chooser.policy(retention)) for chooser in CHOOSERS}
        for chooser, (exact, tokens) in judged.items():
            result["rates"].setdefault(chooser.name, {})[f"{retention:g}"] = _both(exact, tokens)
        pairs = [(Chooser(), Chooser(score)) for score in SCORES[2:]]
        pairs += [(Chooser(score), Chooser(score, False)) for score in SCORES]
        for first, second in pairs:
            compared = record(paired(judged[first][1], judged[second][1]))
            result["paired"].append({"first": first.name, "second": second.name, "retention": retention, **compared})
    return result


def _both(exact: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    return {"exact": record(rate(exact)), "tokens": record(rate(tokens))}


__all__ = ["SCORES", "Chooser", "transcribe", "transcript_samples", "transcripts"]
