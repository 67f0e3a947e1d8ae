"""A prompt on its way through the layers: what is left of it, and how a method's scores make it fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.hf.context import Frame
from asymvlm.hf.layers import Rotary
from asymvlm.methods.before.base import PositiveScores, VisionPrompt
from asymvlm.methods.inside.base import InsideMethod, Joined, LayerTokens, StageTokens
from asymvlm.prompt.choosing import check_answer
from asymvlm.prompt.columns import marked_columns
from asymvlm.prompt.selection import Selection
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.roles import Tokens
from asymvlm_kernels import PrunedSequence, gather_rows, prune_sequence


@dataclass(frozen=True)
class Given:
    """The budget of a stage whose counts are known."""

    given: torch.Tensor  # (B,) int64
    max_ratio: float = 1.0

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.given.to(mask.device, torch.int32)


@dataclass(eq=False, kw_only=True)
class Prefill(Frame):
    """B rows of S columns, of which S' are left."""

    method: InsideMethod
    policy: VisionPruning
    prompt: VisionPrompt  # of all columns
    asking: torch.Tensor  # (B, S) bool
    noted: Mapping[str, torch.Tensor]  # (B, S) each
    groups: torch.Tensor | None  # (B, S) image number, where a row has several
    tokens: Tokens  # (B, S') each: those that are left
    index: torch.Tensor  # (B, S') int64: their columns, -1 = padding
    done: list[int] = field(default_factory=list)  # layers of the method that the prompt has passed
    real: dict[int, torch.Tensor] = field(default_factory=dict)  # first layer of a stage -> (B, S'): columns seen
    lengths: dict[int, torch.Tensor] = field(default_factory=dict)  # first layer of a stage -> (B,) tokens held
    columns: dict[int, torch.Tensor] = field(default_factory=dict)  # first layer of a stage -> (B, S'): `index` there
    masks: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # id of a layer's own mask -> itself, the stage's
    rotary: Rotary | None = None  # of all columns
    first: PrunedSequence | None = None  # what the first dropping decided

    @property
    def compact(self) -> bool:
        """Whether what is left is numbered anew."""
        return self.method.compact or self.policy.positions == "compact"

    def at_hand(self, rows: torch.Tensor) -> torch.Tensor:
        """``(B, S)`` of all columns at those that are left; 0 where padded."""
        chosen = rows.gather(1, self.index.clamp_min(0))
        return chosen.masked_fill(self.index < 0, 0)

    def stage(self, layer: int) -> StageTokens:
        """What the method knows in front of ``layer``."""
        noted = {name: self.at_hand(rows) for name, rows in self.noted.items()}
        return StageTokens(self.tokens, self.at_hand(self.prompt.text), self.at_hand(self.asking), noted, layer)

    def select(self, seen: LayerTokens, scores: torch.Tensor) -> PrunedSequence:
        """The tokens with the highest scores, by the budget of the stage."""
        check_answer(self.method, "scores", scores, self.tokens, torch.float32)
        own, budget = self.method.budget, self.policy.budget
        if own is not None:
            counts = own.at(len(self.done), self.prompt.tokens.prunable.sum(1))
            budget = Given(torch.minimum(counts, self.tokens.prunable.sum(1)))
        groups = None if self.groups is None else gather_rows(self.groups, self.index, pad=-1)
        return self._prune(seen.hidden, scores, budget, groups, self.policy.per_image)

    def join(self, seen: LayerTokens, scores: torch.Tensor, pruned: PrunedSequence) -> tuple[PrunedSequence, Any]:
        """The same with the tokens that the method makes of those that go, and the hidden states they are in."""
        kept = marked_columns(pruned.index, seen.hidden.shape[1])
        joined: Joined | None = self.method.join(seen, scores, kept & self.tokens.prunable)
        if joined is None:
            return pruned, None
        chosen = (kept | joined.mask) & self.tokens.prunable
        return self._prune(seen.hidden, chosen.float(), PositiveScores(), None, False), joined

    def _prune(
        self, hidden: torch.Tensor, scores: torch.Tensor, budget: Any, groups: torch.Tensor | None, per_image: bool
    ) -> PrunedSequence:
        tokens = self.tokens
        return prune_sequence(
            hidden.float() if hidden.dtype == torch.float64 else hidden,
            tokens.vision,
            tokens.text,
            scores=scores,
            budget=budget,
            protect=tokens.text | tokens.structural,
            groups=groups,
            per_image=per_image,
            carry={"ids": tokens.ids, "vision": tokens.vision, "separators": tokens.separators, "columns": self.index},
            carry_pad={"columns": -1},
        )

    def shorten(self, pruned: PrunedSequence) -> None:
        """Go on with what is left."""
        real = pruned.index >= 0
        self.tokens = Tokens(pruned.carry["ids"], real, pruned.carry["vision"] & real, pruned.carry["separators"])
        self.index = pruned.carry["columns"].masked_fill(~real, -1)

    def hide(self, kept: torch.Tensor) -> None:
        """Go on with all columns, of which only ``kept`` ``(B, S)`` bool count."""
        tokens = self.tokens
        real = tokens.real & kept
        self.tokens = Tokens(tokens.ids, real, tokens.vision & real, tokens.separators & real)

    def selection(self) -> Selection:
        """What became of the prompt."""
        whole, first = self.prompt.tokens, self.first
        assert first is not None
        return Selection(
            lengths_before=whole.real.sum(-1),
            lengths_after=(self.index >= 0).sum(-1),
            num_vision=whole.prunable.sum(-1),
            counts=self.tokens.prunable.sum(-1).to(torch.int32),
            gaps=first.gap,
            scores=first.scores,
            own=first.own,
            index=self.index,
            has_text=torch.ones_like(whole.real[:, 0]),
            columns_before=whole.ids.shape[1],
            image_grids=self.prompt.grids,
        )


def taken(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` ``(B, S')`` of ``(B, S, D)``, 0 where it is -1; differentiable where a gradient is asked for."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return gather_rows(hidden, index)
    rows = hidden.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, hidden.shape[-1]))
    return rows.masked_fill((index < 0)[..., None], 0)


def asking(tokens: Tokens, labels: torch.Tensor | None) -> torch.Tensor:
    """``(B, S)`` bool: the last real token of each row, or the last in front of its first label."""
    if labels is None:
        return tokens.last
    answered = ((labels.to(tokens.ids.device) != -100) & tokens.real).cumsum(1) > 0
    front = tokens.real & ~answered
    return front & (front.long().flip(-1).cumsum(-1).flip(-1) == 1)


def keeping(tokens: Tokens, asks: torch.Tensor) -> Tokens:
    """A vision token that asks stays, as the last token of a prompt does."""
    return Tokens(tokens.ids, tokens.real, tokens.vision, tokens.separators | (tokens.vision & asks))
