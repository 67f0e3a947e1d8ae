"""SparseVLM: text that looks at the image rates vision tokens in three stages, and tokens that go are recycled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from asymvlm.methods.before.base import VisionPrompt
from asymvlm.methods.inside.base import InsideMethod, Joined, LayerTokens, StageTokens
from asymvlm.methods.inside.budget import StageBudget, average, scaled_layers, shares_for
from asymvlm.methods.inside.density_peaks import cluster_means, density_peaks

LAYERS, PUBLISHED_LAYERS = (3, 7, 16), 32  # behind layers 2, 6 and 15, whose attention scores
OF = 576  # vision tokens of LLaVA-1.5
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PUBLISHED_V2 = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
RECYCLED = 3, 10  # of the tokens that go, three in ten are clustered
CLUSTER = 10  # tokens for each cluster
HEADS = 14  # of 28, those of Qwen2-VL
Own = TypeVar("Own", bound="SparseVLM")


@dataclass(frozen=True)
class SparseVLM(InsideMethod):
    """Vision tokens stay that the raters attend to most, the mean over raters and heads, in three stages.

    Raters are chosen once, by the embeddings in front of layer 0, among the text that counts and stands behind an
    image: those that get more than the mean share when each vision token spreads a softmax of its products with all of
    that text. Of n tokens that go, the ``3 n // 10 + 1`` with the highest scores are clustered, ten to a cluster
    (density peaks), and the mean of each cluster goes on in the place of its centre. Later layers number what is left
    from 0. Row by row; clustering synchronises.

    Args:
        stages: layers, and how many of the prompt's tokens stay, recycled ones not counted; None of `published`:
            300, 200 and 110 of 576 behind layers 2, 6 and 15.
    Raises:
        NotImplementedError: in a call, for positions of several axes (M-RoPE); `SparseVLM2` keeps positions.
        ValueError: in a call, for a row whose images have no text behind them.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv:2410.04417"
    needs_text: ClassVar[bool] = True
    needs_one_axis: ClassVar[bool] = True
    recycles: ClassVar[bool] = True
    counts: ClassVar[Mapping[int, tuple[int, ...]]] = PUBLISHED

    stages: StageBudget = StageBudget(LAYERS, PUBLISHED[192], OF)  # noqa: RUF009 frozen

    @classmethod
    def published(cls: type[Own], tokens: int) -> Own:
        """The fixed counts of the paper's code for 192, 128, 96 or 64 tokens on average of LLaVA-1.5's 576."""
        if tokens not in cls.counts:
            raise ValueError(f"counts are published for {', '.join(map(str, cls.counts))} tokens, got {tokens!r}")
        return cls(StageBudget(LAYERS, cls.counts[tokens]))

    @classmethod
    def for_average(cls: type[Own], keep: float, num_layers: int, tokens: int = OF) -> Own:
        """With ``keep`` of the vision tokens on average over the layers of a decoder, recycled ones counted.

        Layers stand at the depth of the published ones; shares are those published for 192 tokens to one power.

        Args:
            tokens: vision tokens of a prompt, for the count of recycled ones; it matters little.
        Raises:
            ValueError: for a decoder of fewer than four layers, or a ``keep`` that the first layers alone exceed.
        """
        layers = scaled_layers(LAYERS, PUBLISHED_LAYERS, num_layers)

        def held(shares: Sequence[float]) -> float:
            before, found = tokens, []
            for share in shares:
                kept = min(before, max(1, int(share * tokens)))
                before = kept + (_clusters(before - kept) if cls.recycles else 0)
                found.append(before / tokens)
            return average(layers, found, num_layers)

        shares = [kept / OF for kept in cls.counts[192]]
        return cls(StageBudget.shares(layers, shares_for(shares, keep, held, layers[0] / num_layers)))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.stages.layers

    @property
    def budget(self) -> StageBudget:
        return self.stages

    @property
    def compact(self) -> bool:
        return self.recycles

    def begin(self, prompt: VisionPrompt) -> Mapping[str, torch.Tensor]:
        """The raters."""
        tokens = prompt.tokens
        text = prompt.text & (tokens.prunable.cumsum(1) > 0)
        return {
            "raters": torch.stack([_raters(*row) for row in zip(prompt.embeds, tokens.prunable, text, strict=True)])
        }

    def rows(self, stage: StageTokens) -> torch.Tensor:
        return stage.noted["raters"]

    def scores(self, seen: LayerTokens) -> torch.Tensor:
        return seen.attention

    def join(self, seen: LayerTokens, scores: torch.Tensor, kept: torch.Tensor) -> Joined | None:
        going = seen.tokens.prunable & ~kept
        if not self.recycles or not bool(going.any()):
            return None
        mask, hidden = torch.zeros_like(kept), seen.hidden.clone()
        for row in range(len(kept)):
            columns = going[row].nonzero()[:, 0]
            if len(columns) == 0:
                continue
            order = scores[row, columns].nan_to_num(nan=-torch.inf).sort(descending=True, stable=True).indices
            best = columns[order[: _recycled(len(columns))]].sort().values
            rows, clusters = seen.hidden[row, best], _clusters(len(columns))
            centres, member = density_peaks(rows, clusters)
            mask[row, best[centres]] = True
            hidden[row, best[centres]] = cluster_means(rows, member, clusters).to(hidden.dtype)
        return Joined(mask, hidden)


@dataclass(frozen=True)
class SparseVLM2(SparseVLM):
    """The second version of SparseVLM: positions stay, nothing is recycled, and 14 heads score.

    These are the heads whose attention from raters to vision tokens has the largest sum, half of the heads where a
    model has fewer than 28. The published counts are others, too.
    """

    name: ClassVar[str] = "sparsevlm v2"
    needs_one_axis: ClassVar[bool] = False
    recycles: ClassVar[bool] = False
    per_head: ClassVar[bool] = True
    counts: ClassVar[Mapping[int, tuple[int, ...]]] = PUBLISHED_V2

    stages: StageBudget = StageBudget(LAYERS, PUBLISHED_V2[192], OF)  # noqa: RUF009 frozen

    def scores(self, seen: LayerTokens) -> torch.Tensor:
        assert seen.heads is not None
        sums = (seen.heads * seen.tokens.prunable[:, None]).sum(-1)  # (B, H)
        best = sums.sort(dim=1, descending=True, stable=True).indices[:, : min(HEADS, max(1, sums.shape[1] // 2))]
        return seen.heads.gather(1, best[..., None].expand(-1, -1, seen.heads.shape[-1])).mean(1)


def _raters(embeds: torch.Tensor, vision: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Of one row: ``(S, D)``, ``(S,)`` bool, ``(S,)`` bool -> ``(S,)`` bool. All of equal text rates."""
    raters = torch.zeros_like(text)
    if not bool(text.any()) or not bool(vision.any()):
        return raters
    share = (embeds[vision].float() @ embeds[text].float().T).softmax(1).mean(0)
    above = share > share.mean()
    raters[text] = above if bool(above.any()) else torch.ones_like(above)
    return raters


def _recycled(going: int) -> int:
    return min(going, going * RECYCLED[0] // RECYCLED[1] + 1)


def _clusters(going: int) -> int:
    return _recycled(going) // CLUSTER + 1 if going else 0
