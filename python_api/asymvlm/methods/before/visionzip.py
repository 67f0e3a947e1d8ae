"""VisionZip: the tokens that the vision tower attends to, and a few into which the others are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize, one_hot

from asymvlm.methods.before.base import Kept, SelectingMethod, VisionPrompt
from asymvlm.methods.before.candidates import Candidates, first_of
from asymvlm.methods.before.vispruner import check_share

MILLION = 1_000_000


@dataclass(frozen=True)
class VisionZip(SelectingMethod):
    """Dominant tokens have the most attention of the tower; of the rest every n-th is a target that others join.

    A token joins the target of its own image whose key is most similar, and a target becomes itself plus the mean of
    what joined it. What has no target in its image is dropped. The released code merges what the tower made of patches
    before the projector, and keeps CLIP's class token as one of the dominant; here projected embeddings are merged,
    which exist for every family, and there is no class token among them.

    Args:
        contextual: share of the budget that is targets, in [0, 1]; rounded down, at least one and never all of them
            where the budget is two or more. The paper's: 10 of 64.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv:2412.04467"
    needs_tower_attention: ClassVar[bool] = True

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        check_share("contextual", self.contextual)

    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        among = Candidates.of(prompt)
        count = counts.long()
        targets = (count * round(self.contextual * MILLION) // MILLION).clamp_min(1).minimum(count - 1).clamp_min(0)
        dominant = first_of(among.ranked(among.numbers(prompt.tower_attention)), count - targets)
        mask, embeds = among.marked(dominant), prompt.embeds.clone()
        for row, number in enumerate(targets.tolist()):
            rest = among.index[row][among.mask[row] & ~dominant[row]]
            if number:
                chosen = rest[:: max(1, len(rest) // number)][:number]
                mask[row, chosen] = True
                _join(embeds[row], chosen, rest[~torch.isin(rest, chosen)], prompt.tower_keys[row], prompt.images[row])
        return Kept(mask, embeds)


def _join(
    embeds: torch.Tensor, targets: torch.Tensor, others: torch.Tensor, keys: torch.Tensor, images: torch.Tensor
) -> None:
    """Add to each target the mean of the others that join it, in place: ``(S, D)``, and columns of it."""
    if not len(others):
        return
    unit = normalize(keys.float(), dim=-1)
    similarity = (unit[others] @ unit[targets].mT).nan_to_num(nan=-torch.inf)
    similarity = similarity.masked_fill(images[others][:, None] != images[targets], -torch.inf)
    nearest, target = similarity.max(-1)  # the first of equal ones
    joins = one_hot(target, len(targets)) * nearest.isfinite()[:, None]
    total = joins.float().mT @ embeds[others].float()
    embeds[targets] += (total / joins.sum(0).clamp_min(1)[:, None]).to(embeds.dtype)
