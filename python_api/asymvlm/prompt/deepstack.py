"""DeepStack (Qwen3-VL): features of several tower layers, added to the vision tokens after the first decoder layers.

They are rows of their own, one for every vision token in reading order, so pruning has to thin them out with the same
index; the decoder gets them by its pre-hook, because a composite without images passes it none. Other families hand
their decoder rows for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.models.adapter import Adapter
from asymvlm_kernels import gather_rows


@dataclass(frozen=True, eq=False)
class DeepStack:
    """The features of a shortened prompt."""

    place: torch.Tensor  # (B, S') int64: row of each token in ``rows``, -1 where it has none
    rows: list[torch.Tensor]  # one (kept vision tokens, D) for each layer that adds them


def prune_deepstack(record: Mapping[str, Any], index: torch.Tensor, first: int = 0) -> DeepStack | None:
    """Thin out what the composite recorded by ``index`` ``(B, S')``, which counts from column ``first``.

    None for a family without DeepStack.
    """
    features = record.get("deepstack_visual_embeds")
    if features is None:
        return None
    mask = record["visual_pos_masks"]
    place = (mask.flatten().cumsum(0).view_as(mask) - 1).masked_fill(~mask, -1)
    kept = gather_rows(place[:, first:].contiguous(), index, pad=-1)
    rows = kept[kept >= 0]
    renumbered = (kept >= 0).flatten().cumsum(0).view_as(kept) - 1
    return DeepStack(renumbered.masked_fill(kept < 0, -1), [feature[rows] for feature in features])


def deepstack_inputs(stack: DeepStack, past: int, queries: int, batch: int) -> dict[str, Any]:
    """The decoder's arguments for ``queries`` tokens behind ``past``, for a batch that may repeat rows (beams)."""
    place = stack.place.repeat_interleave(batch // stack.place.shape[0], 0)[:, past : past + queries]
    place = torch.nn.functional.pad(place, (0, queries - place.shape[1]), value=-1)
    mask = place >= 0
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": [rows[place[mask]] for rows in stack.rows]}


def decoder_rows(
    adapter: Adapter, record: Mapping[str, Any], index: torch.Tensor, first: int
) -> dict[str, torch.Tensor]:
    """The kept rows of the decoder's arguments beside the embeddings, ``(B, S', ...)``."""
    whole = {name: record[name][:, first:] for name in adapter.decoder_rows if record.get(name) is not None}
    return {name: gather_rows(rows.flatten(2), index).unflatten(-1, rows.shape[2:]) for name, rows in whole.items()}
