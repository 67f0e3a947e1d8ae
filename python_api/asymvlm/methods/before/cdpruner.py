"""CDPruner: tokens that are relevant to the question and unlike each other, as a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates
from asymvlm.methods.before.flashvlm import scaled
from asymvlm_kernels import cosine_matrix, dpp_map


@dataclass(frozen=True)
class CDPruner(SelectingMethod):
    """The greedy MAP set of the kernel ``relevance_i * cos(v_i, v_j) * relevance_j`` over projected embeddings.

    Relevance is the mean cosine to the text that counts, from 0 to 1 within a row. The released code negates it for
    CLIP's text tower, which no family here has: the question is read as the decoder's embeddings.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "arXiv:2506.10967"
    needs_text: ClassVar[bool] = True

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among = Candidates.of(prompt)
        relevance = torch.zeros(among.index.shape, device=among.index.device)
        for row, (embeds, index, text) in enumerate(zip(prompt.embeds, among.index, prompt.text, strict=True)):
            index = index[index >= 0]
            if len(index) and text.any():  # a row without text keeps all of its tokens
                question = normalize(embeds[text].float(), dim=-1).mean(0)
                relevance[row, : len(index)] = scaled(normalize(embeds[index].float(), dim=-1) @ question)
        kernel = relevance[:, :, None] * cosine_matrix(among.rows(prompt.embeds), among.mask) * relevance[:, None]
        most = int(counts.max()) if len(counts) else 0
        return Kept(among.marked(dpp_map(kernel, among.mask, counts, capacity=most)))
