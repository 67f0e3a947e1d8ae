"""What the vision tower saw, made of it and attended to, brought to the vision tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from asymvlm.hf.errors import MechanismError
from asymvlm.hf.tower import TowerOutputs, hidden_states
from asymvlm.models.adapter import Adapter, Grid, Grids, Inputs
from asymvlm.tokens.roles import Tokens


@dataclass(frozen=True, eq=False)
class TowerReader:
    """Reads a call's tower by vision token; results are of the columns from ``first`` on, and zero elsewhere."""

    model: nn.Module
    adapter: Adapter
    inputs: Inputs
    outputs: TowerOutputs
    tokens: Tokens
    grids: Grids
    first: int = 0

    def features(self) -> torch.Tensor:
        """Hidden states that the projector reads, ``(B, S, Dv)``."""
        pool = self._pool()
        self._check_runs(len(self.outputs.found))
        return self._place(pool(hidden_states(self.model.config, self.outputs.found[0])))

    def attention(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tower attends to, ``(B, S)`` fp32, and its keys, ``(B, S, Dk)``."""
        pool = self._pool()
        self._check_runs(len(self.outputs.attention))
        found = self.outputs.attention[0]
        return self._place(pool(found.attention[..., None]))[..., 0], self._place(pool(found.keys))

    def pixels(self) -> torch.Tensor:
        """Numbers that are equal where pixels are, ``(B, S, n)`` int64."""
        if self.adapter.pixels is None:
            raise NotImplementedError(
                f"the {self.adapter.model_type} adapter does not say which pixels a vision token is made from"
            )
        self._check_runs(len([name for name in self.adapter.triggers if self.inputs.get(name) is not None]))
        try:
            numbers = self.adapter.pixels(self.model, self.inputs, self._known())
        except KeyError as error:
            raise NotImplementedError(f"pixels by vision token of {self.adapter.model_type} need {error}") from error
        return self._place(numbers)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Tower features ``(n, Dv)`` to embeddings ``(n, D)``, by the model's own projector."""
        if self.adapter.projector is None:
            raise NotImplementedError(
                f"the projector of {self.adapter.model_type} is not known to see one patch at a time: merge its "
                "embeddings, not its features"
            )
        with torch.no_grad():
            found: torch.Tensor = self.model.get_submodule(self.adapter.projector)(features)
        return found

    def _pool(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows by patch to rows by vision token."""
        tower_tokens, asked = self.adapter.tower_tokens, self.inputs.get("vision_feature_layer")
        if asked is not None:
            raise NotImplementedError(
                f"the vision tower is read as the configuration says: leave out vision_feature_layer, got {asked}"
            )
        if tower_tokens is None:
            raise NotImplementedError(
                f"the {self.adapter.model_type} adapter does not say how patches of its vision tower become tokens"
            )
        return lambda rows: tower_tokens(self.model, self.inputs, rows, self._known())

    def _check_runs(self, runs: int) -> None:
        if runs != 1 or len(self.grids) != 1:
            raise NotImplementedError(
                "features of the vision tower need one kind of pictures in a call, got "
                f"{', '.join(self.grids) or 'none'} and {runs} runs of the tower"
            )

    def _known(self) -> list[Grid]:
        kinds = self.grids.values()
        return [grid for kind in kinds for grid in kind if 0 not in grid or self.adapter.views > 1]

    def _place(self, rows: torch.Tensor) -> torch.Tensor:
        places = self.tokens.vision & ~self.tokens.separators
        if len(rows) != int(places.sum()):
            raise MechanismError(
                "reading the vision tower", f"{len(rows)} features for {int(places.sum())} vision tokens"
            )
        found = rows.new_zeros((*places.shape, rows.shape[-1]))
        found[places] = rows
        return found[:, self.first :]
