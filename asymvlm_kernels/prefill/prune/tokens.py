"""What the kernels of `prune_sequence` read and write, as named groups: each is one argument of a kernel.

On the host the fields are tensors, in a kernel pointers. Strides and lengths stay arguments of their own, because
Triton compiles anew for the values of integers in a tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Tokens(NamedTuple):
    """A batch of prompts before it is shortened. The last three may be None."""

    embeds: Any  # (B, S, D)
    vision_mask: Any  # (B, S) bool, as the other masks
    text_mask: Any
    protect: Any
    weight: Any  # (D,) fp32
    lines: Any = None  # (B, S) int64 or int32, along which scores spread


class Kept(NamedTuple):
    """What `score_select` answers."""

    scores: Any  # (B, S) fp32, -inf outside the prunable vision tokens
    gap: Any  # (B,) fp32
    counts: Any  # (B,) int32, K
    lengths: Any  # (B,) int32
    order: Any  # (B, S) int32, the kept places, ascending, padded with -1
    own: Any = None  # (B, S) fp32, the scores before they spread; None where they do not


def kept_of(outputs: tuple[Any, ...]) -> Kept:
    """The outputs of `score_select`, of which the last is a list: the scores before they spread, if they do."""
    *results, own = outputs
    return Kept(*results, *own)


class Scratch(NamedTuple):
    """Pieces of one allocation, and counters that are zero and that each kernel leaves zero again."""

    parts: Any  # fp32, B x tiles x parts x slots: sums of a part of a tile, and what it found alone (see `parts`)
    squares: Any  # fp32, B x rounds x parts x block_l partial ||t||^2
    keys: Any  # int32, B x tiles x block_n rank keys
    lists: Any  # int32, B x block_s keys of a bin, for long rows
    counters: Any  # int32, B x (bins of a long row, one a tile, one for the sample)
    spread_keys: Any = None  # int32, as many as keys: those of the scores after they have spread
