"""VisionZip: the tokens that the vision tower attends to, and a few into which the others are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize, one_hot

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates, first_of
from asymvlm.methods.before.vispruner import check_share
from asymvlm_kernels.millionths import part_of


@dataclass(frozen=True)
class VisionZip(SelectingMethod):
    """Dominant tokens have the most attention of the tower; of the rest every n-th is a target that others join.

    A token joins the target of its own image whose key is most similar, and a target becomes itself plus the mean of
    what joined it. What has no target in its image is dropped. The released code keeps CLIP's class token as one of the
    dominant, which is no vision token here.

    Args:
        contextual: share of the budget that is targets, in [0, 1]; rounded down, at least one and never all of them
            where the budget is two or more. The paper's: 10 of 64.
        before_projector: merge what the tower made of patches, and project that, as the released code does; for
            families whose projector sees one patch at a time (LLaVA 1.5, LLaVA-NeXT). Else projected embeddings.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv:2412.04467"
    needs_tower: ClassVar[bool] = True
    needs_tower_attention: ClassVar[bool] = True

    contextual: float = 10 / 64
    before_projector: bool = False

    def __post_init__(self) -> None:
        check_share("contextual", self.contextual)

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among = Candidates.of(prompt)
        count = counts.long()
        targets = part_of(count, self.contextual).clamp_min(1).minimum(count - 1).clamp_min(0)
        dominant = first_of(among.ranked(among.numbers(prompt.tower_attention)), count - targets)
        mask, embeds = among.marked(dominant), prompt.embeds.clone()
        for row, number in enumerate(targets.tolist()):
            rest = among.index[row][among.mask[row] & ~dominant[row]]
            if not number:
                continue
            chosen = rest[:: max(1, len(rest) // number)][:number]
            others = rest[~torch.isin(rest, chosen)]
            shares = _shares(prompt.tower_keys[row], prompt.images[row], chosen, others)
            rows = (prompt.features if self.before_projector else prompt.embeds)[row]
            merged = (rows[chosen].float() + shares @ rows[others].float()).to(rows.dtype)
            embeds[row, chosen] = prompt.project(merged) if self.before_projector else merged
            mask[row, chosen] = True
        return Kept(mask, embeds)


def _shares(keys: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which share of what joins a target each other token is: ``(S, Dk)`` and columns to ``(targets, others)`` fp32."""
    if not len(others):
        return keys.new_zeros((len(targets), 0), dtype=torch.float32)
    unit = normalize(keys.float(), dim=-1)
    similarity = (unit[others] @ unit[targets].mT).nan_to_num(nan=-torch.inf)
    similarity = similarity.masked_fill(images[others][:, None] != images[targets], -torch.inf)
    nearest, target = similarity.max(-1)  # the first of equal ones
    joins = (one_hot(target, len(targets)) * nearest.isfinite()[:, None]).float().mT
    return joins / joins.sum(1, keepdim=True).clamp_min(1)
