"""DivPrune: the tokens that lie farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates
from asymvlm_kernels import cosine_matrix, farthest_points


@dataclass(frozen=True)
class DivPrune(SelectingMethod):
    """Each time the token whose most similar chosen one is least similar, by the cosine of projected embeddings.

    The first is the token whose nearest neighbour is farthest. It sees neither the question nor the tower.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv:2503.02175"

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among = Candidates.of(prompt)
        similarity = cosine_matrix(among.rows(prompt.embeds), among.mask)
        return Kept(among.marked(farthest_points(similarity, among.mask, counts)))
