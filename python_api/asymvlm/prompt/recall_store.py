"""What stays beside a cache so that dropped vision tokens can come back: their embeddings, and where they stood.

All vision tokens of a prompt that could be dropped are stored, the kept ones too: a later question ranks them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.hf.arguments import MASK
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.masks import FULL, SLIDING
from asymvlm.hf.windows import sliding_window
from asymvlm.methods import VisionPrompt
from asymvlm.models.adapter import Adapter, Grid
from asymvlm.settings.policies import VisionPruning
from asymvlm_kernels import gather_rows

HOST = "host"  # the setting that keeps embeddings in host memory


@dataclass(frozen=True, eq=False)
class RecallStore:
    """The prunable vision tokens of B prompts, N columns in reading order, rows filled up behind."""

    embeds: torch.Tensor  # (B, N, D) merged embeddings before layer 0, on the device or the host
    places: torch.Tensor  # (B, N) int64, original column, -1 = no token
    positions: torch.Tensor  # (B, N) or (R, B, N), as the decoder sees them
    reach: torch.Tensor  # (B, N) int64, last column that a token may attend to: its own, or the end of its open block
    images: torch.Tensor  # (B, N) int64, image of each token, -1 where there is none
    lines: torch.Tensor | None  # (B, N) int64, line of its image, where scores are spread along lines
    grids: list[list[Grid]] | None  # of each row's images

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        policy: VisionPruning,
        prompt: VisionPrompt,
        positions: torch.Tensor,
        record: Mapping[str, Any],
        text_config: Any,
        first: int = 0,
    ) -> RecallStore:
        """Of a prompt that was read, whatever of it stays.

        Args:
            positions: ``(B, S)`` or ``(R, B, S)``, as the decoder sees them.
            record: of `merge_embeddings`, whose columns before ``first`` are not the prompt's.
        """
        check_family(adapter, text_config)
        prunable = prompt.tokens.prunable
        most = int(prunable.sum(-1).max())
        order = (~prunable).long().argsort(dim=1, stable=True)[:, :most]
        places = order.masked_fill(~prunable.gather(1, order), -1)
        reach = _reach(record.get(MASK), prompt.tokens.real, prunable, text_config, first)
        embeds = gather_rows(prompt.embeds, places)
        return cls(
            embeds=embeds.cpu() if policy.recall == HOST else embeds,
            places=places,
            positions=positions.gather(-1, order.expand(*positions.shape[:-1], most)).contiguous(),
            reach=reach.gather(1, order),
            images=gather_rows(prompt.images, places, pad=-1),
            lines=None if policy.spread is None else gather_rows(prompt.cells.line, places, pad=-1),
            grids=prompt.grids,
        )

    def rows(self, index: torch.Tensor) -> RecallStore:
        """Of the rows ``index`` ``(rows,)``, in that order."""
        names = ("places", "reach", "images", *(() if self.lines is None else ("lines",)))
        picked: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        return dataclasses.replace(
            self,
            embeds=self.embeds[index.to(self.embeds.device)],
            positions=self.positions.index_select(-2, index),
            grids=self.grids and [self.grids[row] for row in index.tolist()],
            **picked,
        )

    def behind(self, columns: int) -> RecallStore:
        """The same tokens where ``columns`` others stand in front of their prompt."""
        places = torch.where(self.places >= 0, self.places + columns, -1)
        return dataclasses.replace(self, places=places, reach=self.reach + columns)

    def joined(self, later: RecallStore | None) -> RecallStore:
        """With the tokens of a later prompt, told in the same columns; None for one without any."""
        if later is None:
            return self
        pairs = {name: (getattr(self, name), getattr(later, name)) for name in ("images", "lines")}
        numbers = {name: None if a is None or b is None else _numbered_on(a, b) for name, (a, b) in pairs.items()}
        known = self.grids is not None and later.grids is not None
        return RecallStore(
            embeds=torch.cat([self.embeds, later.embeds.to(self.embeds)], 1),
            places=torch.cat([self.places, later.places], 1),
            positions=torch.cat([self.positions, later.positions], -1),
            reach=torch.cat([self.reach, later.reach], 1),
            images=numbers["images"],  # type: ignore[arg-type]
            lines=numbers["lines"],
            grids=[a + b for a, b in zip(self.grids or [], later.grids or [], strict=True)] if known else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


def check_family(adapter: Adapter, text_config: Any) -> None:
    """Refuse a decoder that cannot take tokens of a prompt behind others.

    Raises:
        NotImplementedError: with the reason.
    """
    for reason, found in (
        ("recurrent layers, whose state has read on", adapter.recurrent),
        ("attention in chunks", adapter.chunked),
        ("features added behind its first layers (DeepStack)", adapter.deepstack),
        ("rows of its own for each layer", bool(adapter.decoder_rows)),
        ("latent keys", adapter.latent_keys),
    ):
        if found:
            raise NotImplementedError(f"recall does not serve {adapter.model_type}: its decoder has {reason}")
    implementation = text_config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise NotImplementedError(f"recall needs attn_implementation 'sdpa' or 'eager', got {implementation!r}")


def _numbered_on(numbers: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """Both side by side, the second's numbers (-1 = none) behind the first's."""
    after = int(numbers.max()) + 1 if numbers.numel() else 0
    return torch.cat([numbers, torch.where(later >= 0, later + after, -1)], 1)


def _reach(masks: Any, real: torch.Tensor, prunable: torch.Tensor, text_config: Any, first: int) -> torch.Tensor:
    """``(B, S)`` int64: the last column that each token may attend to, by the masks that the family made.

    Raises:
        NotImplementedError: if they are not causal with blocks that are open to their end, and windows of columns.
    """
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    full, sliding = (masks.get(kind) for kind in (FULL, SLIDING)) if isinstance(masks, dict) else (masks, None)
    if full is None or (isinstance(full, torch.Tensor) and full.ndim == 2):
        return places
    if not isinstance(full, torch.Tensor) or full.ndim != 4:
        raise NotImplementedError(f"recall needs dense masks of a prompt, got {type(full).__name__}")
    opened = _open(full)[:, first:, first:]
    reach = places.shape[1] - 1 - opened.flip(-1).long().argmax(-1)
    wanted = real[:, None] & (places[:, None] <= reach[..., None])
    window = sliding_window(text_config)
    near = wanted if window is None else wanted & (places[..., None] - places[:, None] < window)
    pairs = [(opened, wanted)] if sliding is None else [(opened, wanted), (_open(sliding)[:, first:, first:], near)]
    if any(bool(((found != expected) & prunable[..., None]).any()) for found, expected in pairs):
        raise NotImplementedError(
            "recall knows masks that are causal or open to the end of a block, within windows, and this prompt's is not"
        )
    return reach


def _open(mask: torch.Tensor) -> torch.Tensor:
    """``(B, S, S)`` bool of a bool or additive ``(B, 1, S, S)``."""
    if mask.shape[-1] != mask.shape[-2]:
        raise MechanismError("reading the masks of a prompt", f"one of shape {tuple(mask.shape)}")
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


__all__ = ["HOST", "RecallStore", "check_family"]
