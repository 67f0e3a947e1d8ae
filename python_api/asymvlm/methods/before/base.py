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


class Tower(NamedTuple):
    """What the vision tower made of the images, by vision token: the mean over its patches where it joins several."""

    features: torch.Tensor  # (B, S, Dv), zero rows where there is no vision token
    attention: torch.Tensor | None  # (B, S) fp32, head mean of the class token's attention; None without such a token


@dataclass(frozen=True, eq=False)
class VisionPrompt:
    """A batch of merged prompts, B rows of S columns, before layer 0. Tensors are on the model's device.

    A method reads it and changes nothing in it. Rows are padded; what is real is in ``tokens``.
    """

    tokens: Tokens  # roles: `.prunable` marks the tokens to choose among, `.vision`, `.text`, `.real`, `.ids`
    embeds: torch.Tensor  # (B, S, D), the model's dtype: vision features and embeddings of text
    text: torch.Tensor  # (B, S) bool: the text that counts, by the setting ``text=``
    images: torch.Tensor  # (B, S) int64: number of the image that a vision token belongs to, -1 elsewhere
    grids: list[list[Grid]] | None  # (rows, columns) of each row's images in reading order; None where unknown
    make_cells: Callable[[], Cells] = field(repr=False)
    make_tower: Callable[[], Tower] = field(repr=False)

    @cached_property
    def cells(self) -> Cells:
        """Where each vision token lies in its image's grid.

        Raises:
            ValueError: for a family whose grids are not known.
        """
        return self.make_cells()

    @cached_property
    def tower(self) -> Tower:
        """Features of the vision tower, before the projector. The tower runs no second time.

        Raises:
            NotImplementedError: for a family whose tower cannot be read.
        """
        return self.make_tower()


class BeforeMethod(ABC):
    """Scores vision tokens; those with the highest scores stay, as many as the budget says."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_text: ClassVar[bool] = False  # rows without text then keep all their vision tokens
    needs_tower: ClassVar[bool] = False  # `VisionPrompt.tower` is read

    @abstractmethod
    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        """``(B, S)`` fp32: the higher, the longer a token stays; of equal ones the first. NaN ranks last.

        Read where ``prompt.tokens.prunable`` is True. A row's scores must not depend on the other rows.
        """


class Kept(NamedTuple):
    """What a `SelectingMethod` decided."""

    mask: torch.Tensor  # (B, S) bool, True for ``counts`` prunable tokens of each row
    embeds: torch.Tensor | None = None  # (B, S, D) to go on with where tokens were joined; None: as they were


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
