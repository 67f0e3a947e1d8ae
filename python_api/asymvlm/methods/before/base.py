"""What a method of vision pruning sees of a prompt, and what it answers: scores, or the tokens that stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch

from asymvlm.models.adapter import Grid
from asymvlm.tokens.images import Cells
from asymvlm.tokens.roles import Tokens
from asymvlm_kernels import Budget, ScoreBudget


@dataclass(frozen=True)
class PositiveScores:
    """The budget of a method that decides itself how many tokens stay: those with a positive score do."""

    max_ratio: float = 1.0

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 scores and bool mask -> ``(B,)`` int32."""
        return ((scores > 0) & mask).sum(-1).to(torch.int32)


@dataclass(frozen=True, eq=False)
class VisionPrompt:
    """A batch of merged prompts, B rows of S columns, before layer 0. Tensors are on the model's device.

    A method reads it and changes nothing in it. Rows are padded; what is real is in ``tokens``.

    Attributes:
        tokens: roles, each ``(B, S)``: ``.prunable`` marks the tokens to choose among; ``.vision``, ``.text``,
            ``.real`` (no padding), ``.last`` (each row's last real token) are bool, ``.ids`` are the input ids.
        embeds: ``(B, S, D)``, the model's dtype: vision features and embeddings of text.
        text: ``(B, S)`` bool: the text that counts, by the setting ``text=``.
        images: ``(B, S)`` int64: number of the image that a vision token belongs to, -1 elsewhere. Numbers go on from
            row to row: two tokens of a row are of one image if they are equal.
        grids: (rows, columns) of each row's images in reading order; None where unknown.
        project: tower features ``(n, Dv)`` to the embeddings that the model makes of them, ``(n, D)``; a
            NotImplementedError for a family whose projector sees several patches at once.
    """

    tokens: Tokens
    embeds: torch.Tensor
    text: torch.Tensor
    images: torch.Tensor
    grids: list[list[Grid]] | None
    make_cells: Callable[[], Cells] = field(repr=False)
    make_features: Callable[[], torch.Tensor] = field(repr=False)
    make_attention: Callable[[], tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    make_pixels: Callable[[], torch.Tensor] = field(repr=False)
    project: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)

    @cached_property
    def cells(self) -> Cells:
        """Where each vision token lies in its image's grid: ``.row``, ``.column``, ``.height``, ``.width``, ``.line``.

        Each ``(B, S)`` int64, -1 outside of grids; ``line`` is distinct for all lines of all images of the batch.

        Raises:
            ValueError: for a family whose grids are not known.
        """
        return self.make_cells()

    @cached_property
    def features(self) -> torch.Tensor:
        """``(B, S, Dv)``: what the vision tower made of each vision token, before the projector, where it is prunable.

        The mean over its patches where a token joins several; zero elsewhere. Only for methods with ``needs_tower``;
        the tower runs no second time.

        Raises:
            NotImplementedError: for a family whose tower cannot be read, or a call with images and videos.
        """
        return self.make_features()

    @cached_property
    def tower_attention(self) -> torch.Tensor:
        """``(B, S)`` fp32: what the vision tower attends to, in the layer whose output the projector reads.

        The class token's row where the tower has one, else the mean of all rows; of both the mean over the heads, and
        over the patches of a token. Zero outside of vision. Only for methods with ``needs_tower_attention``.

        Raises:
            NotImplementedError: for a family whose tower cannot be read, or a call with images and videos.
        """
        return self._attention[0]

    @cached_property
    def tower_keys(self) -> torch.Tensor:
        """``(B, S, Dk)``: the keys of that layer before rotary positions, means as of `tower_attention`."""
        return self._attention[1]

    @cached_property
    def _attention(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.make_attention()

    @cached_property
    def pixels(self) -> torch.Tensor:
        """``(B, S, n)`` int64: numbers of the pixels under each vision token: all equal where all pixels are.

        Comparable within a call. Zero outside of vision. Synchronises.

        Raises:
            NotImplementedError: for a family that does not say which pixels a token has, or a call with images and
                videos.
        """
        return self.make_pixels()


class BeforeMethod(ABC):
    """Scores vision tokens; those with the highest scores stay, as many as the budget says."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_text: ClassVar[bool] = False  # rows without text then keep all their vision tokens
    needs_tower: ClassVar[bool] = False  # `VisionPrompt.features` is read
    needs_grid: ClassVar[bool] = False  # `VisionPrompt.cells` is read
    needs_pixels: ClassVar[bool] = False  # `VisionPrompt.pixels` is read
    needs_tower_attention: ClassVar[bool] = False  # `VisionPrompt.tower_attention` or `.tower_keys` is read
    budget: ClassVar[Budget | ScoreBudget | None] = None  # where the settings name none

    @abstractmethod
    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        """``(B, S)`` fp32: the higher, the longer a token stays; of equal ones the first. NaN ranks last.

        Read where ``prompt.tokens.prunable`` is True. A row's scores must not depend on the other rows.
        """


class Kept(NamedTuple):
    """What a `SelectingMethod` decided."""

    mask: torch.Tensor  # (B, S) bool, True for ``counts`` prunable tokens of each row, or fewer
    embeds: torch.Tensor | None = None  # (B, S, D) to go on with where tokens were joined; None: as they were
    alone: bool = False  # these tokens and no others: the floors of several images add none


class SelectingMethod(BeforeMethod):
    """Chooses a set of vision tokens that is not the best of any scores: greedy, diverse or merging methods."""

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        """Only for budgets that look at scores; a method without any serves a `UniformBudget`."""
        raise ValueError(
            f"{self.name or type(self).__name__} chooses tokens without scoring them: pass a UniformBudget"
        )

    @abstractmethod
    def keep(self, prompt: VisionPrompt, counts: torch.Tensor) -> Kept:
        """The tokens that stay, ``counts`` ``(B,)`` int64 of each row."""
