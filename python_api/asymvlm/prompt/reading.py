"""Reads the merged prompt of a call for a method of vision pruning: roles, text, images and their grids."""

from __future__ import annotations

from torch import nn

from asymvlm.hf.arguments import EMBEDS
from asymvlm.hf.tower import TowerOutputs
from asymvlm.methods.before.base import VisionPrompt
from asymvlm.models.adapter import Adapter, Inputs
from asymvlm.prompt.tower import TowerReader
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
    outputs: TowerOutputs | None = None,
) -> VisionPrompt:
    """What a method sees of a call.

    Args:
        record: of `merge_embeddings`.
        first: column where the prompt begins: those before it are in a cache, and only tell images.
        outputs: what the vision tower handed out meanwhile, where the method asked for it.
    """
    input_ids, mask = check_prompt(inputs)
    embeds = record[EMBEDS].detach()
    tokens = Tokens.read(model, adapter, input_ids, mask, inputs, embeds)
    text = scored_text(tokens, policy.text, inputs.get("labels"))
    layout = image_layout(model, adapter, tokens, inputs)
    images, by_row = read_images(layout, adapter.views, first)
    grids = layout[-1]

    tower = TowerReader(model, adapter, inputs, outputs or TowerOutputs(), tokens, grids, first)

    def cells() -> Cells:
        return Cells(*(rows[:, first:] for rows in known_cells(layout, adapter.model_type)))

    return VisionPrompt(
        tokens=tokens.behind(first) if first else tokens,
        embeds=embeds[:, first:],
        text=text[:, first:],
        images=images,
        grids=by_row,
        make_cells=cells,
        make_features=tower.features,
        make_attention=tower.attention,
        make_pixels=tower.pixels,
        project=tower.project,
    )
