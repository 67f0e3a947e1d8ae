"""Reads the merged prompt of a call for a method of vision pruning: roles, text, images and their grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.tower import hidden_states
from asymvlm.methods.before.base import VisionPrompt
from asymvlm.models.adapter import Adapter, Grids, Inputs
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import Cells, image_layout, known_cells, read_images
from asymvlm.tokens.roles import Tokens, check_prompt, scored_text


def read_prompt(
    model: nn.Module,
    adapter: Adapter,
    policy: VisionPruning,
    inputs: Inputs,
    record: Inputs,
    first: int = 0,
    towers: Sequence[Any] = (),
) -> VisionPrompt:
    """What a method sees of a call.

    Args:
        record: of `merge_embeddings`.
        first: column where the prompt begins: those before it are in a cache, and only tell images.
        towers: what the vision tower returned meanwhile, where the method asked for it.
    """
    input_ids, mask = check_prompt(inputs)
    embeds = record[EMBEDS].detach()
    tokens = Tokens.read(model, adapter, input_ids, mask, inputs, embeds)
    text = scored_text(tokens, policy.text, inputs.get("labels"))
    layout = image_layout(model, adapter, tokens, inputs)
    images, by_row = read_images(layout, adapter.views, first)
    grids = layout[-1]

    def features() -> torch.Tensor:
        return _features(model, adapter, inputs, towers, tokens, grids)[:, first:]

    def cells() -> Cells:
        return Cells(*(rows[:, first:] for rows in known_cells(layout, adapter.model_type)))

    return VisionPrompt(
        tokens=tokens.behind(first) if first else tokens,
        embeds=embeds[:, first:],
        text=text[:, first:],
        images=images,
        grids=by_row,
        make_cells=cells,
        make_features=features,
    )


def _features(
    model: nn.Module, adapter: Adapter, inputs: Inputs, outputs: Sequence[Any], tokens: Tokens, grids: Grids
) -> torch.Tensor:
    """Hidden states of the vision tower by vision token, ``(B, S, Dv)``."""
    if adapter.tower_tokens is None:
        raise NotImplementedError(
            f"the {adapter.model_type} adapter does not say how patches of its vision tower become tokens"
        )
    known = [grid for kind in grids.values() for grid in kind if 0 not in grid or adapter.views > 1]
    if len(outputs) != 1 or len(grids) != 1:
        raise NotImplementedError(
            f"features of the vision tower need one kind of pictures in a call, got {', '.join(grids) or 'none'} and "
            f"{len(outputs)} runs of the tower"
        )
    rows = adapter.tower_tokens(model, inputs, hidden_states(model.config, outputs[0]), known)
    places = tokens.vision & ~tokens.separators
    if len(rows) != int(places.sum()):
        raise MechanismError("reading the vision tower", f"{len(rows)} features for {int(places.sum())} vision tokens")
    found = rows.new_zeros((*places.shape, rows.shape[-1]))
    found[places] = rows
    return found
