"""FlashVLM: the tokens that the vision tower attends to and the question is about, then some unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from asymvlm.methods.before.base import VisionPrompt
from asymvlm.methods.before.candidates import Candidates
from asymvlm.methods.before.vispruner import VisPruner

SHARP, SHARPER, POWER = 0.05, 0.01, 2.5  # temperatures over the text and over the vision tokens
QUANTILE, BELOW = 0.995, 0.1
SMALLEST = 1e-6


@dataclass(frozen=True)
class FlashVLM(VisPruner):
    """Attention of the tower times likeness to the question, half and half in the logarithm; the rest as `VisPruner`.

    Likeness is computed between projected vision tokens and the text that counts (``text=`` of `VisionPruning`): the
    released code for Qwen takes the system prompt, and its gate does nothing in the code for LLaVA.

    Args:
        important: share of the budget that goes by the score alone, in [0, 1]; rounded down.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    name: ClassVar[str] = "flashvlm"
    paper: ClassVar[str] = "arXiv:2512.20561"
    needs_text: ClassVar[bool] = True

    def importance(self, prompt: VisionPrompt, among: Candidates) -> torch.Tensor:
        scores = torch.zeros(among.index.shape, device=among.index.device)
        attention = among.numbers(prompt.tower_attention)
        for row, (embeds, index, text) in enumerate(zip(prompt.embeds, among.index, prompt.text, strict=True)):
            index = index[index >= 0]
            if len(index) and text.any():  # a row without text keeps all of its tokens
                likeness = question_likeness(embeds[index].float(), embeds[text].float())
                parts = torch.stack([scaled(attention[row, : len(index)]), likeness])
                scores[row, : len(index)] = (0.5 * parts.clamp_min(SMALLEST).log()).sum(0).exp()
        return scores


def question_likeness(vision: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """How much each vision token stands out by its likeness to the text, ``(N, D)``, ``(L, D)`` -> ``(N,)`` in [0, 1].

    Of a token's cosines the mean weighted by their softmax; of these a sharp softmax over the tokens, raised to a
    power; what is below a high quantile is damped.
    """
    cosines = normalize(vision, dim=-1) @ normalize(text, dim=-1).mT
    found = ((cosines / SHARP).softmax(-1) * cosines).sum(-1)
    found = scaled((found / SHARPER).softmax(0) ** POWER)
    return scaled(torch.where(found < torch.quantile(found, QUANTILE), BELOW * found, found))


def scaled(values: torch.Tensor) -> torch.Tensor:
    """``(N,)`` from 0 to 1; all 0 where they are equal."""
    least, most = values.aminmax()
    return (values - least) / torch.where(most > least, most - least, 1.0)
