"""Answers by greedy decoding, for methods that work while a prompt is read: there an answer fed along would be seen.

Equal to teacher forcing for exact match, and slower (`bench.quality.answers`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

import asymvlm
from asymvlm import VisionPruning
from bench.quality.scorers import model_inputs
from bench.tinyvlm.evaluate import ROWS, Samples
from bench.tinyvlm.model import NUM_VISION


def batches_of_one_length(samples: Samples) -> Iterator[torch.Tensor]:
    """Numbers of samples whose questions have equally many tokens, at most `ROWS` of them: no padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(samples.question.sum(1).tolist()):
        groups[length].append(number)
    for _, numbers in sorted(groups.items()):
        yield from torch.tensor(numbers).split(ROWS)


@torch.inference_mode()
def generated_answers(model: Any, samples: Samples, vision: VisionPruning) -> torch.Tensor:
    """``(n,)`` bool: whether a model under ``vision`` generates each sample's answer, end of text included."""
    right = torch.zeros(len(samples), dtype=torch.bool)
    with asymvlm.patch(model, vision=vision):
        for rows in batches_of_one_length(samples):
            inputs = model_inputs(samples, rows.tolist(), answers=False)
            prompt = inputs["input_ids"].shape[1]
            labels = samples.labels[rows, prompt - 1 - NUM_VISION :]
            steps = int((labels >= 0).sum(1).max())
            output = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, prompt:]
            output = torch.nn.functional.pad(output, (0, steps - output.shape[1]))
            right[rows] = ((output == labels[:, :steps]) | (labels[:, :steps] < 0)).all(1)
    return right


__all__ = ["batches_of_one_length", "generated_answers"]
