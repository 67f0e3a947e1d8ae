"""The pass under the soft mask over text rows alone, beside the vision keys and values of the pass without it."""

from __future__ import annotations

import torch
from torch import nn

from asymvlm.hf.arguments import EMBEDS, MASK, POSITIONS, USE_CACHE
from asymvlm.hf.context import entered
from asymvlm.hf.text_rows import Layer, Remembering, TextRows, dummy_masks
from asymvlm.training.passes import FrozenModel, MergedBatch, exact_type
from asymvlm_kernels import gather_rows
from asymvlm_kernels.prefill.reference import compact

Layers = dict[nn.Module, Layer]
OTHERWISE = "masked_rows='all' runs the whole sequence"
OF_VISION = ("visual_pos_masks", "deepstack_visual_embeds")  # added to vision tokens, whose work is done already
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@torch.no_grad()
def remembered(frozen: FrozenModel, batch: MergedBatch) -> tuple[torch.Tensor, Layers]:
    """The pass without a soft mask: `FrozenModel.hidden`, and what each attention layer was given."""
    with entered(Remembering()) as pass_:
        hidden = frozen.hidden(batch)
    return hidden, pass_.layers


def text_rows(frozen: FrozenModel, batch: MergedBatch, layers: Layers, bias: torch.Tensor) -> torch.Tensor:
    """Last hidden states of the compared positions under a bias ``(B, S)`` on the keys: ``(positions, D)`` fp32.

    Rows are all tokens that cannot be pruned; vision tokens stay as ``layers`` have them. Differentiable in ``bias``.
    """
    rows = ~batch.prunable
    index = compact(rows, int(rows.sum(-1).max()))
    decoder = {name: _of_rows(value, index, batch) for name, value in batch.decoder.items() if name not in OF_VISION}
    positions = batch.positions
    decoder |= {
        EMBEDS: gather_rows(batch.embeds, index),
        MASK: dummy_masks(batch.decoder[MASK], index, batch.embeds),
        POSITIONS: positions.gather(-1, index.clamp_min(0).expand(*positions.shape[:-1], -1)),
        USE_CACHE: False,
    }
    with entered(TextRows(layers=layers, index=index, bias=bias)):
        output = frozen.text(**frozen.callee.write(decoder))
    compared = batch.compared.gather(1, index.clamp_min(0)) & (index >= 0)
    hidden: torch.Tensor = output.last_hidden_state[compared]
    return hidden.to(exact_type(hidden))


def check_text_rows(frozen: FrozenModel, batch: MergedBatch) -> None:
    """Without a bias, rows by themselves must be what they are in the whole pass.

    Inside `FrozenModel.frozen`.

    Raises:
        ValueError: for a family where they are not: recurrent layers, attention by index, or a decoder whose code does
            more with its input than attend.
    """
    kind = frozen.adapter.model_type
    for reason, found in (
        ("recurrent layers", frozen.adapter.recurrent),
        ("attention in chunks", frozen.adapter.chunked),
    ):
        if found:
            raise ValueError(f"{kind!r} has {reason}, so text rows cannot run by themselves: {OTHERWISE}")
    wanted, layers = remembered(frozen, batch)
    with torch.no_grad():
        alone = text_rows(frozen, batch, layers, torch.zeros(batch.prunable.shape, device=batch.embeds.device))
    away = float((alone - wanted).norm() / wanted.norm().clamp_min(1e-12))
    if not away <= TOLERANCE[batch.embeds.dtype]:
        raise ValueError(
            f"text rows of {kind!r} by themselves are {away:.2g} of their length away from the whole pass, wanted "
            f"{TOLERANCE[batch.embeds.dtype]:g} at most: {OTHERWISE}"
        )


def _of_rows(value: object, index: torch.Tensor, batch: MergedBatch) -> object:
    """A decoder's argument of shape ``(B, S, ...)`` at the rows; others as they are."""
    if not isinstance(value, torch.Tensor) or value.shape[:2] != batch.prunable.shape:
        return value
    places = index.clamp_min(0)[(...,) + (None,) * (value.ndim - 2)]
    return value.gather(1, places.expand(-1, -1, *value.shape[2:]))


__all__ = ["check_text_rows", "remembered", "text_rows"]
