"""Rotary embeddings of all columns so far: layers that number their tokens anew take theirs from here.

A layer of n tokens where others hold N gives the t-th token behind the prompt the position n + t. That position was
embedded before, of an earlier token, with the factors and the dtype of the model; so nothing is computed a second time.
"""

from __future__ import annotations

import torch

from asymvlm.hf.layers import Rotary


class RotaryTable:
    """Each row's embeddings by position, the newest last: ``(B, T, D)`` each, real tokens of the prompt on the right.

    Args:
        rotary: of a prompt's columns, each ``(1 or B, S, D)``.
        real: ``(B, S)`` bool, without gaps in a row.
    """

    def __init__(self, rotary: Rotary, real: torch.Tensor) -> None:
        columns = torch.arange(real.shape[1], device=real.device)
        begin = real.int().argmax(1, keepdim=True)
        source = (begin + columns - (real.shape[1] - real.sum(1, keepdim=True))).clamp_min(0)
        self.parts: Rotary = tuple(
            part.expand(len(real), -1, -1).gather(1, source.to(part.device)[..., None].expand(-1, -1, part.shape[-1]))
            for part in rotary
        )

    def extend(self, rotary: Rotary, past: int) -> None:
        """New tokens behind the first ``past`` columns; what a cropped cache has given up is forgotten."""
        self.parts = tuple(
            torch.cat([old[:, :past], new.to(old.device).expand(len(old), -1, -1)], 1)
            for old, new in zip(self.parts, rotary, strict=True)
        )

    def rows(self, index: torch.Tensor) -> RotaryTable:
        """Of the rows ``index`` ``(rows,)``, in that order."""
        other = object.__new__(RotaryTable)
        other.parts = tuple(part[index.to(part.device)] for part in self.parts)
        return other


def ranks(real: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Columns of the prompt at which tokens numbered anew stand: those of its first tokens.

    Args:
        real: ``(B, S')`` bool, what is left. whole: ``(B, S)`` bool, the prompt.
    Returns:
        ``(B, S')`` int64.
    """
    return whole.int().argmax(1, keepdim=True) + (real.long().cumsum(1) - 1).clamp_min(0)


def check_consecutive(positions: torch.Tensor | None, real: torch.Tensor) -> None:
    """Refuse prompts whose tokens cannot be numbered anew.

    Args:
        positions: ``(B or 1, S)`` of the decoder, or None for 0 to S - 1. real: ``(B, S)`` bool.
    Raises:
        NotImplementedError: for positions of several axes, with gaps, or of rows with padding inside.
    """
    reason = None
    if positions is not None and positions.ndim != 2:
        reason = "positions of several axes (M-RoPE)"
    else:
        inner = real[:, 1:] & real[:, :-1]
        starts = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
        if bool((starts > 1).any()):
            reason = "padding inside a row"
        elif positions is not None and bool(((positions.diff(dim=1) != 1) & inner).any()):
            reason = "positions with gaps"
    if reason is not None:
        raise NotImplementedError(
            f"a method that numbers tokens anew needs one position a token, without gaps, got {reason}: take one that "
            "keeps positions"
        )
