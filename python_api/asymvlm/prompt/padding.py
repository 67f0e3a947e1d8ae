"""Where the padding of a shortened batch goes: its rows keep different numbers of tokens.

Rows are filled up on the left, and padding behind a row's last vision token stays where it is: so the last columns are
the caller's last columns, whatever the layout, for those who read logits there (completions padded right behind prompts
padded left). In a call with labels nobody does, and a batch that is padded on the right alone is closed up on the left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from asymvlm.hf.arguments import POSITIONS
from asymvlm.models.adapter import Inputs
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


def padding_side(real: torch.Tensor, *, labelled: bool) -> str:
    """Where rows are filled up. Decoding wants the left; a labelled batch padded right stays short on the right."""
    return "right" if labelled and bool(real[:, 0].all()) and not bool(real[:, -1].all()) else "left"


def padding_to_keep(real: torch.Tensor, prunable: torch.Tensor) -> torch.Tensor:
    """``(B, S)`` bool: padding that holds the place of the tokens behind a row's last vision token, or of its end."""
    behind_vision = prunable.flip(-1).cumsum(-1).flip(-1) == 0
    return ~real & behind_vision & (real.cumsum(-1) > 0)


def check_last_columns(inputs: Inputs, prunable: torch.Tensor) -> None:
    """Logits may be asked for of last columns that pruning leaves in place.

    Raises:
        NotImplementedError: for columns given one by one.
        ValueError: if a vision token that may go stands among them, or for a negative number.
    """
    wanted = inputs.get("logits_to_keep")
    if isinstance(wanted, torch.Tensor):
        raise NotImplementedError("logits_to_keep must be a number of last columns, got columns of the unpruned prompt")
    if wanted is not None and wanted < 0:
        raise ValueError(f"logits_to_keep must be 0 or more last columns, got {wanted}")
    if wanted is None or wanted <= 1:
        return
    reached = prunable[:, -wanted:].any(-1)
    if bool(reached.any()):
        rows, most = reached.nonzero()[:, 0].tolist(), int((~prunable.any(0)).flip(0).cumprod(0).sum())
        raise ValueError(
            f"logits_to_keep={wanted} reaches vision tokens of rows {rows}, which pruning may remove: ask for the last "
            f"{most} columns or fewer, or for all (logits_to_keep=0)"
        )
