"""AsymVLM: a vision token matters as much as the text token that it resembles most.

score(v) = max over text t of sum_d w_d v_d t_d with v and t normalised; w is learned, or ones for cosine similarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from asymvlm.methods.before.base import BeforeMethod, VisionPrompt
from asymvlm_kernels import gather_rows, score_tokens
from asymvlm_kernels.prefill.reference import compact


@dataclass(frozen=True, eq=False)
class AsymVLM(BeforeMethod):
    """Eq. 1 of the paper. With `patch` scoring, selection and gathering are one fused call.

    Args:
        scorer: a `Scorer`, a ``(D,)`` fp32 tensor, or None for cosine similarity.
    """

    name: ClassVar[str] = "asymvlm"
    paper: ClassVar[str] = "arXiv:2605.29535"
    needs_text: ClassVar[bool] = True

    scorer: Any = None

    @property
    def weight(self) -> torch.Tensor | None:
        """``(D,)`` fp32; None means ones."""
        weight: torch.Tensor | None = getattr(self.scorer, "weight", self.scorer)
        return weight

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.detach().to(prompt.embeds.device)
        return sequence_scores(prompt.embeds, prompt.tokens.prunable, prompt.text, weight)


def sequence_scores(
    embeds: torch.Tensor, prunable: torch.Tensor, text: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """Score the vision tokens of merged sequences against the text in them. Reads the longest text on the host.

    Args:
        embeds: ``(B, S, D)``. prunable, text: ``(B, S)`` bool. weight: ``(D,)`` fp32, differentiable; None means ones.
    Returns:
        ``(B, S)`` fp32, -inf outside ``prunable``.
    """
    index = compact(text, int(text.sum(-1).max()) if text.numel() else 0)
    embeds = embeds.float() if embeds.dtype == torch.float64 else embeds
    return score_tokens(embeds, gather_rows(embeds, index), weight, vision_mask=prunable, text_mask=index >= 0)
