"""Where the padding of a shortened batch goes: its rows keep different numbers of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from asymvlm.hf.arguments import POSITIONS
from asymvlm_kernels import PrunedSequence, gather_rows


def pad_in_place(
    pruned: PrunedSequence, carry_pad: Mapping[str, int], types: Mapping[str, torch.Tensor]
) -> PrunedSequence:
    """Padding where tokens were dropped instead of on one side.

    Behind an earlier turn no token may end up further from it than it was: a sliding cache would have let go of what
    its window reaches. Token types ``(B, S)`` stay those of the dropped tokens, which hold an image's block together.
    """
    (batch, length), columns = pruned.index.shape, pruned.scores.shape[1]
    kept = torch.zeros(batch, columns + 1, dtype=torch.bool, device=pruned.index.device)
    kept = kept.scatter_(1, pruned.index.where(pruned.index >= 0, columns), True)[:, :columns]
    spare = (~kept).cumsum(1) <= length - kept.sum(1, keepdim=True)
    places = (~(kept | spare)).long().argsort(dim=1, stable=True)[:, :length]
    is_real = kept.gather(1, places)
    first = (pruned.index >= 0).long().argmax(1, keepdim=True)  # its padding is on one side
    slots = torch.where(is_real, first + is_real.cumsum(1) - 1, -1)

    def move(name: str, rows: torch.Tensor) -> torch.Tensor:
        if name == POSITIONS and rows.ndim == 3:
            return gather_rows(rows.permute(1, 2, 0), slots).permute(2, 0, 1).contiguous()
        return gather_rows(rows, slots, pad=carry_pad.get(name, 0))

    carry = {name: move(name, rows) for name, rows in pruned.carry.items() if name not in types}
    return dataclasses.replace(
        pruned,
        embeds=gather_rows(pruned.embeds, slots),
        index=gather_rows(pruned.index, slots, pad=-1),
        carry=carry | {name: rows.gather(1, places) for name, rows in types.items()},
    )


def padding_side(real: torch.Tensor) -> str:
    """Padding stays on the side the processor put it; an unpadded batch is padded left, as decoding wants it."""
    return "right" if bool(real[:, 0].all()) and not bool(real[:, -1].all()) else "left"
