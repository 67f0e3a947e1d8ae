"""AsymVLM: a vision token matters as much as the text token that it resembles most.

score(v) = max over text t of sum_d w_d v_d t_d with v and t normalised; w is learned, or ones for cosine similarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from asymvlm.methods.before.base import BeforeMethod, VisionPrompt
from asymvlm_kernels import gather_rows, score_tokens


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
        rows = prompt.embeds.float() if prompt.embeds.dtype == torch.float64 else prompt.embeds
        most = int(prompt.text.sum(1).max()) if prompt.text.numel() else 0
        place = (~prompt.text).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        index = place.masked_fill(~prompt.text.gather(1, place), -1)
        weight = None if self.weight is None else self.weight.detach().to(rows.device)
        return score_tokens(
            rows, gather_rows(rows, index), weight, vision_mask=prompt.tokens.prunable, text_mask=index >= 0
        )
