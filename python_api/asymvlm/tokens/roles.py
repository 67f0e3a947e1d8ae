"""The role of every token of a prompt: what is real, what is vision and may go, what is text to score against.

Pruning, scorer training, reports and the choice of a strategy all read roles here, so that they mean the same tokens.

    <s> Look at | <img> v v v n | v v v n | </img> what is due ? <pad>
    text          text  vision, n: separators   text             padding
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS, IDS, MASK
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.tokens.user_turns import UserTurns


@dataclass(frozen=True, eq=False)
class Tokens:
    """Roles of a batch of prompts; every tensor is ``(B, S)``, all but ``ids`` bool."""

    ids: torch.Tensor
    real: torch.Tensor  # not padding
    vision: torch.Tensor  # real, and the composite writes a vision feature there
    separators: torch.Tensor  # vision that is structure (learned newlines), never pruned and in no grid

    @classmethod
    def read(
        cls,
        model: nn.Module,
        adapter: Adapter,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        inputs: Inputs | None = None,
        embeds: torch.Tensor | None = None,
    ) -> Tokens:
        """Roles by the ids and the mask of a call; separators where its ``inputs`` and merged ``embeds`` are given."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        vision = adapter.vision_mask(model, ids) & real
        own = None if inputs is None or embeds is None else adapter.separators_of(model, inputs, embeds)
        return cls(ids, real, vision, torch.zeros_like(vision) if own is None else vision & own)

    def behind(self, first: int) -> Tokens:
        """Of the columns from ``first`` on."""
        return Tokens(*(x[:, first:] for x in (self.ids, self.real, self.vision, self.separators)))

    @cached_property
    def text(self) -> torch.Tensor:
        """Real tokens that are not vision."""
        return self.real & ~self.vision

    @cached_property
    def last(self) -> torch.Tensor:
        """The token whose hidden state predicts the answer: kept even where a prompt ends in an image."""
        return self.real & (self.real.long().flip(-1).cumsum(-1).flip(-1) == 1)

    @cached_property
    def prunable(self) -> torch.Tensor:
        """Vision that may go: what N counts."""
        return self.vision & ~self.separators & ~self.last

    @cached_property
    def structural(self) -> torch.Tensor:
        """Vision that stays whatever it scores."""
        return self.vision & ~self.prunable

    @cached_property
    def before_vision(self) -> torch.Tensor:
        """Columns with a vision token at them or behind."""
        return self.vision.flip(-1).cumsum(-1).flip(-1) > 0


def scored_text(
    tokens: Tokens,
    text: str | UserTurns | torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    turn_wanted: bool = True,
) -> torch.Tensor:
    """``(B, S)`` bool: the text that vision is scored against.

    Args:
        text: "all", the words of the user's turns, or a mask of one's own.
        labels: ``(B, S)``; tokens with one (not -100) are an answer, which does not choose the tokens that it is judged
            by. A mask of one's own says otherwise.
        turn_wanted: rows with images have to have a user's turn.
    Raises:
        ValueError: if shapes differ, or a row has none.
    """
    if isinstance(text, torch.Tensor):
        if text.shape != tokens.ids.shape:
            raise ValueError(
                f"the text mask must have the shape of input_ids {tuple(tokens.ids.shape)}, got {tuple(text.shape)}"
            )
        return tokens.text & text.to(tokens.ids.device)
    if labels is not None and labels.shape != tokens.ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids {tuple(tokens.ids.shape)}, got {tuple(labels.shape)}"
        )
    found = tokens.text if labels is None else tokens.text & (labels == -100)
    if isinstance(text, str):
        return found
    words, has_turn = text.find(tokens.ids)
    lost = (tokens.vision.any(-1) & ~has_turn).nonzero()[:, 0].tolist() if turn_wanted else []
    if lost:
        raise ValueError(
            f"text='user' wants the ids {list(text.begin)} that open a user's turn, rows {lost} have images and none "
            "of them: make the prompt with the chat template, or pass text='all' or a mask"
        )
    return found & words


def check_prompt(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and the 2-D mask of a call, or an error that names what was found."""
    input_ids, mask = inputs.get(IDS), inputs.get(MASK)
    if input_ids is None:
        raise ValueError("pruning needs input_ids beside the images: embeddings do not tell where vision tokens are")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, S), got {tuple(input_ids.shape)}")
    if inputs.get(EMBEDS) is not None:
        raise ValueError("pass input_ids or inputs_embeds beside the images, got both")
    if mask is None:
        return input_ids, torch.ones_like(input_ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape:
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be the prompt's own 2-D mask {tuple(input_ids.shape)}, got {found}")
    return input_ids, mask
