"""A step behind a prompt pruned between layers: each stage of layers gets the mask and the positions it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asymvlm.hf.arguments import CACHE, MASK, past_length, tokens_of
from asymvlm.hf.context import Frame, push
from asymvlm.hf.layers import at_columns, rotary_of
from asymvlm.inside.masks import later_mask, later_window, open_behind
from asymvlm.inside.state import InsideState, inside_state


@dataclass(eq=False, kw_only=True)
class Later(Frame):
    """``columns`` are seen by the layers that hold all of the prompt."""

    state: InsideState
    columns: int
    new: int  # of them those of the step
    cache: Any
    # first layer of a stage, and whether it slides -> arguments of its layers
    fitted: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def begin(cls, arguments: Mapping[str, Any]) -> Later | None:
        """A step on a cache whose prompt was pruned between layers; None for any other."""
        cache = arguments.get(CACHE)
        state = inside_state(cache)
        if state is None:
            return None
        new = tokens_of(arguments).shape[1]
        later = cls(state=state, columns=past_length(cache) + new, new=new, cache=cache)
        push(later)
        return later

    def arguments(
        self, config: Any, window: int | None, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What layer ``number`` gets in place of what the decoder made for layers that hold all; None for the same.

        Args:
            config: the decoder's. window: of its sliding layers. hidden: ``(B, Q, D)``. kwargs: of the layer.
        """
        stage, table = self.state.stage(number), self.state.rotary
        if stage is None:
            return None
        if table is not None and not self.fitted:
            table.extend(rotary_of(kwargs, number), self.columns - self.new)
        layer = self.cache.layers[number]
        slides = window is not None and bool(getattr(layer, "is_sliding", False))
        if (stage, slides) not in self.fitted:
            new = self.columns - self.state.original_length
            mask = self.state.given.get(MASK)
            behind = open_behind(mask, hidden.shape[1], new, self.columns, hidden)
            fitted: dict[str, Any] = {}
            if slides and window is not None:
                standing, held = self.state.standing(stage, new), layer.keys.shape[-2]
                fitted[MASK] = later_window(config, hidden, standing, behind, held, window)
            else:
                fitted[MASK] = later_mask(config, hidden, self.state.real[stage], behind)
            if table is not None:
                own = torch.arange(self.columns - self.new, self.columns, device=hidden.device)
                fitted |= at_columns(table.parts, own - self.state.dropped(stage).to(hidden.device))
            self.fitted[stage, slides] = fitted
        return self.fitted[stage, slides]
