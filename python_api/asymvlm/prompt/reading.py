"""Reads the merged prompt of a call for a method of vision pruning: roles, text, images and their grids."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS
from asymvlm.methods.before.base import Tower, VisionPrompt
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.settings.policies import VisionPruning
from asymvlm.tokens.images import Cells, grids_by_row, image_cells, image_numbers
from asymvlm.tokens.roles import Tokens, check_prompt, scored_text


def read_prompt(
    model: nn.Module,
    adapter: Adapter,
    policy: VisionPruning,
    inputs: Inputs,
    record: Inputs,
    first: int = 0,
) -> VisionPrompt:
    """What a method sees of a call.

    Args:
        record: of `merge_embeddings`.
        first: column where the prompt begins: those before it are in a cache, and only tell images.
    """
    input_ids, mask = check_prompt(inputs)
    embeds = record[EMBEDS].detach()
    tokens = Tokens.read(model, adapter, input_ids, mask, inputs, embeds)
    text = scored_text(tokens, policy.text, inputs.get("labels"))
    token_ids, grids = adapter.token_ids(model), adapter.grids_of(model, inputs)
    layout = (adapter.unify(input_ids), tokens.vision, tokens.separators, token_ids, grids)
    numbers = image_numbers(*layout)[:, first:]

    def cells() -> Cells:
        if not grids:
            raise ValueError(
                "spread, and methods that go by place, need the grid of an image's tokens, which the "
                f"{adapter.model_type} adapter does not know"
            )
        return Cells(*(rows[:, first:] for rows in image_cells(*layout)))

    return VisionPrompt(
        tokens=tokens.behind(first) if first else tokens,
        embeds=embeds[:, first:],
        text=text[:, first:],
        images=torch.where(numbers < 0, -1, numbers // adapter.views),
        grids=grids_by_row(numbers, input_ids[:, first:], token_ids, grids),
        make_cells=cells,
        make_tower=_tower(adapter),
    )


def _tower(adapter: Adapter) -> Callable[[], Tower]:
    def read() -> Tower:
        raise NotImplementedError(f"the vision tower of {adapter.model_type} cannot be read by methods")

    return read
