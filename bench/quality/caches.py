"""Every method of the K/V cache on transcripts, at equal resident tokens, with the prompt protected and not.

The limit is the prompt and a share of 24 generated tokens, for a page that takes 60 to 72 tokens to read out. Methods
that choose behind the prompt alone keep every generated token, so their prompts are cut until the whole is as large at
the end. With the prompt protected all of the rest must come from generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import asymvlm
from asymvlm.methods import (
    H2O,
    TOVA,
    CachedMethod,
    LastRow,
    OldestFirst,
    PyramidKV,
    RandomEviction,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from bench.harness.cache_entries import Entry
from bench.quality.scorers import model_inputs
from bench.quality.statistics import paired, rate, record
from bench.tinyvlm.evaluate import ROWS, Samples
from bench.tinyvlm.model import NUM_VISION

SHARES = (0.9, 0.75, 0.5)
HELD, RECENT, WINDOW = 24, 6, 8  # generated tokens of which a share is held; newest that stay; SnapKV's window
OURS = "asymvlm (last layer)"


STEPS: tuple[tuple[str, CachedMethod], ...] = (
    ("h2o", H2O()),
    ("h2o, one list a layer", H2O(scope="layer")),
    ("h2o, one list for all", H2O(scope="decoder")),
    ("tova", TOVA()),
    ("streamingllm, re-indexed", StreamingLLM()),
    ("streamingllm, original positions", StreamingLLM(positions="original")),
    ("last row, all layers alike", LastRow()),
    ("oldest first", OldestFirst()),
    ("random", RandomEviction()),
)
ENTRIES = (
    Entry.paper(OURS),
    Entry.paper(f"asymvlm, {RECENT} recent kept", recent=RECENT),
    *(Entry(name, method, protected) for name, method in STEPS for protected in (True, False)),
    Entry("snapkv", SnapKV(window=WINDOW), protected=False),
    Entry("pyramidkv", PyramidKV(window=WINDOW), protected=False),
    Entry("vl-cache", VLCache(), protected=False),
)


@torch.inference_mode()
def read_out(model: Any, samples: Samples, settings: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Greedy tokens ``(B, T)`` behind the questions, and bytes of the tokens in the caches at the end."""
    parts, held = [], 0
    with asymvlm.patch(model, vision=1.0, **settings) as handle:
        for rows in torch.arange(len(samples)).split(ROWS):
            inputs = model_inputs(samples, rows.tolist(), answers=False)
            prompt = inputs["input_ids"].shape[1]
            steps = 1 + NUM_VISION + samples.text.shape[1] - prompt
            output = model.generate(**inputs, max_new_tokens=steps, eos_token_id=None, do_sample=False)
            parts.append(output[:, prompt:])
            assert handle.last is not None
            held += 0 if handle.last.eviction is None else handle.last.eviction.cache.token_bytes
    return torch.cat(parts), held


def caches(model: Any, samples: Samples, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Table 3 in shape: share of right tokens, and bytes of the tokens held at the end, by method."""
    questions = int(samples.question.sum(1)[0])
    truth, prompt = samples.labels[:, questions:], 1 + NUM_VISION + questions
    wanted = truth >= 0

    def judge(settings: dict[str, Any]) -> tuple[np.ndarray, int]:
        found, held = read_out(model, samples, settings)
        return ((found == truth) & wanted).sum(1).div(wanted.sum(1)).numpy(), held

    full, _ = judge({})
    result: dict[str, Any] = {"held": HELD, "prompt": prompt, "generated": truth.shape[1], "full": record(rate(full))}
    result |= {"rates": {}, "bytes": {}, "paired": []}
    for share in shares:
        judged = {}
        for entry in ENTRIES:
            judged[entry.title], held = judge(entry.equal_to(int(HELD * share), prompt, truth.shape[1]))
            result["rates"].setdefault(entry.title, {})[f"{share:g}"] = record(rate(judged[entry.title]))
            result["bytes"].setdefault(entry.title, {})[f"{share:g}"] = held // len(samples)
        ours = ENTRIES[0].title
        result["paired"] += [
            {"first": title, "second": ours, "share": share, **record(paired(values, judged[ours]))}
            for title, values in judged.items()
            if title != ours
        ]
    return result


__all__ = ["ENTRIES", "SHARES", "caches", "read_out"]
