"""A token beside one that matters matters too: ``s'_i = (1 - share) * s_i + share * max_{j near i} s_j``.

Eq. 1 scores each token by itself. In a document the token that resembles the question (a name, a key) is seldom the one
that answers it, which stands beside it on the same line and resembles nothing that was asked. Spreading hands the best
score within ``reach`` tokens of the line on to its neighbours. Ours, not the paper's: exact match of the small VLM of
``bench/tinyvlm`` at keep 0.15 rises from 0.18 to 0.55 (cosine similarity); see docs/decisions/quality.md.

Plain PyTorch: 2 * reach shifts of ``(B, S)`` scores. On a GPU `prune_sequence` does it in its first launch, bit for bit
(`prune.spread_item`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_shape


@dataclass(frozen=True)
class Spread:
    """How far scores spread along the lines of an image, and how much.

    Args:
        reach: tokens to either side, at least 1.
        share: of the neighbourhood's best score, in (0, 1]; the rest is the token's own score.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    reach: int = 4
    share: float = 0.7

    def __post_init__(self) -> None:
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or self.reach < 1:
            raise ValueError(f"reach must be a whole number of at least 1, got {self.reach!r}")
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")

    def apply(self, scores: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """Spread scores along lines.

        Args:
            scores: ``(B, S)`` fp32; -inf outside the prunable tokens, where nothing is taken from or given to.
            lines: ``(B, S)`` integers: the line of an image that a token lies on, the same number for all tokens of
                one line, which follow each other in the sequence; a negative number: no line, the score stays.
        Returns:
            ``(B, S)`` fp32. NaN scores stay NaN and are not handed on. Does not synchronise.
        Raises:
            ValueError: on shape, dtype or device mismatch.
        """
        check_shape("scores", scores, ("B", "S"))
        check_dtype("scores", scores, (torch.float32,))
        check_shape("lines", lines, tuple(scores.shape))
        check_dtype("lines", lines, (torch.int64, torch.int32))
        check_device("lines", lines, scores)
        known = scores.masked_fill(scores.isnan(), float("-inf"))
        best = known.clone()
        for step in range(1, min(self.reach, scores.shape[1] - 1) + 1):
            together = (lines[:, step:] == lines[:, :-step]) & (lines[:, step:] >= 0)
            ahead, behind = known[:, step:], known[:, :-step]
            best[:, step:] = best[:, step:].maximum(behind.masked_fill(~together, float("-inf")))
            best[:, :-step] = best[:, :-step].maximum(ahead.masked_fill(~together, float("-inf")))
        mixed = scores * (1 - self.share) + best * self.share
        return torch.where((lines >= 0) & (scores > float("-inf")), mixed, scores)


__all__ = ["Spread"]
