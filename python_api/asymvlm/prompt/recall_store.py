"""What stays beside a cache so that dropped vision tokens can come back: their embeddings, and where they stood.

All vision tokens of a prompt that could be dropped are stored, the kept ones too: a later question ranks them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.hf.arguments import EMBEDS, MASK
from asymvlm.hf.errors import MechanismError
from asymvlm.hf.masks import FULL, SLIDING, opened
from asymvlm.hf.windows import sliding_window
from asymvlm.methods import VisionPrompt
from asymvlm.models.adapter import Adapter, Grid
from asymvlm.prompt.deepstack import DeepStack, decoder_rows, prune_deepstack
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.recall import HOST, Recall
from asymvlm_kernels import gather_rows
from asymvlm_kernels.prefill.reference import compact


@dataclass(frozen=True, eq=False)
class RecallStore:
    """The prunable vision tokens of B prompts, N columns in reading order, rows filled up behind."""

    embeds: torch.Tensor  # (B, N, D) merged embeddings before layer 0, on the device or the host
    places: torch.Tensor  # (B, N) int64, original column, -1 = no token
    positions: torch.Tensor  # (B, N) or (R, B, N), as the decoder sees them
    reach: torch.Tensor  # (B, N) int64, last column that a token may attend to: its own, or the end of its open block
    sliding_reach: torch.Tensor  # the same in sliding layers
    images: torch.Tensor  # (B, N) int64, image of each token, -1 where there is none
    lines: torch.Tensor | None  # (B, N) int64, line of its image, where scores are spread along lines
    grids: list[list[Grid]] | None  # of each row's images
    rows_beside: Mapping[str, torch.Tensor]  # (B, N, ...) arguments of the decoder beside the embeddings
    deepstack: DeepStack | None  # features for its first layers

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
        places = compact(prunable, most)
        order = places.clamp_min(0)
        reach, sliding_reach = _reaches(record.get(MASK), prompt.tokens.real, prunable, text_config, first)
        embeds = gather_rows(prompt.embeds, places)
        beside = decoder_rows(adapter, record, places, first)
        deepstack = prune_deepstack(record, places, first)
        if isinstance(policy.recall, Recall) and policy.recall.store == HOST:
            embeds = embeds.cpu()
            beside = {name: rows.cpu() for name, rows in beside.items()}
            deepstack = deepstack and dataclasses.replace(deepstack, rows=[rows.cpu() for rows in deepstack.rows])
        return cls(
            embeds=embeds,
            places=places,
            positions=positions.gather(-1, order.expand(*positions.shape[:-1], most)).contiguous(),
            reach=reach.gather(1, order),
            sliding_reach=sliding_reach.gather(1, order),
            images=gather_rows(prompt.images, places, pad=-1),
            lines=None if policy.spread is None else gather_rows(prompt.cells.line, places, pad=-1),
            grids=prompt.grids,
            rows_beside=beside,
            deepstack=deepstack,
        )

    def rows(self, index: torch.Tensor) -> RecallStore:
        """Of the rows ``index`` ``(rows,)``, in that order."""
        names = ("places", "reach", "sliding_reach", "images", *(() if self.lines is None else ("lines",)))
        picked: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        return dataclasses.replace(
            self,
            embeds=self.embeds[index.to(self.embeds.device)],
            positions=self.positions.index_select(-2, index),
            grids=self.grids and [self.grids[row] for row in index.tolist()],
            rows_beside={name: rows[index.to(rows.device)] for name, rows in self.rows_beside.items()},
            deepstack=self.deepstack and dataclasses.replace(self.deepstack, place=self.deepstack.place[index]),
            **picked,
        )

    def behind(self, columns: int) -> RecallStore:
        """The same tokens where ``columns`` others stand in front of their prompt."""
        places = torch.where(self.places >= 0, self.places + columns, -1)
        reach, sliding_reach = self.reach + columns, self.sliding_reach + columns
        return dataclasses.replace(self, places=places, reach=reach, sliding_reach=sliding_reach)

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
            sliding_reach=torch.cat([self.sliding_reach, later.sliding_reach], 1),
            images=numbers["images"],  # type: ignore[arg-type]
            lines=numbers["lines"],
            grids=[a + b for a, b in zip(self.grids or [], later.grids or [], strict=True)] if known else None,
            rows_beside={
                name: torch.cat([rows, later.rows_beside[name].to(rows)], 1) for name, rows in self.rows_beside.items()
            },
            deepstack=self.deepstack and later.deepstack and _stacked(self.deepstack, later.deepstack),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        held = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        held += self.rows_beside.values()
        held += [] if self.deepstack is None else [self.deepstack.place, *self.deepstack.rows]
        return sum(tensor.nbytes for tensor in held)

    def arguments(self, slots: torch.Tensor) -> dict[str, Any]:
        """What the decoder gets of the tokens in ``slots`` ``(B, R)`` (-1 = none) beside positions and masks."""
        device = slots.device
        found = {
            name: gather_rows(rows.flatten(2), slots.to(rows.device)).unflatten(-1, rows.shape[2:]).to(device)
            for name, rows in {EMBEDS: self.embeds, **self.rows_beside}.items()
        }
        if self.deepstack is None:
            return found
        place = gather_rows(self.deepstack.place, slots, pad=-1)
        told = place[place >= 0]
        rows = [rows[told.to(rows.device)].to(device) for rows in self.deepstack.rows]
        return found | {"visual_pos_masks": place >= 0, "deepstack_visual_embeds": rows}


def check_family(adapter: Adapter, text_config: Any) -> None:
    """Refuse a decoder that cannot take tokens of a prompt behind others.

    Raises:
        NotImplementedError: with the reason.
    """
    for reason, found in (
        ("recurrent layers, whose state has read on", adapter.recurrent),
        ("attention in chunks", adapter.chunked),
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


def _stacked(stack: DeepStack, later: DeepStack) -> DeepStack:
    """The features of both side by side."""
    place = torch.where(later.place >= 0, later.place + len(stack.rows[0]), -1)
    rows = [torch.cat([a, b.to(a)]) for a, b in zip(stack.rows, later.rows, strict=True)]
    return DeepStack(torch.cat([stack.place, place], 1), rows)


def _reaches(
    masks: Any, real: torch.Tensor, prunable: torch.Tensor, text_config: Any, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For full and for sliding layers, ``(B, S)`` int64: the last column that each token may attend to.

    Raises:
        NotImplementedError: if the family's masks are not causal with blocks that are open to their end, and windows.
    """
    if not isinstance(masks, dict):
        masks = dict.fromkeys((FULL, SLIDING), masks)
    if unknown := sorted(set(masks) - {FULL, SLIDING}):
        raise NotImplementedError(f"recall knows masks of {FULL} and {SLIDING}, got {', '.join(unknown)}")
    window = sliding_window(text_config)
    full, sliding = (masks.get(kind) for kind in (FULL, SLIDING))
    reach = _reach(full, real, prunable, None, first)
    return reach, reach if sliding is full else _reach(sliding, real, prunable, window, first)


def _reach(mask: Any, real: torch.Tensor, prunable: torch.Tensor, window: int | None, first: int) -> torch.Tensor:
    """Of one kind of layer, whose mask may be None, that of real columns ``(B, S)``, or dense."""
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return places
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise NotImplementedError(f"recall needs dense masks of a prompt, got {type(mask).__name__}")
    seen = _open(mask)[:, first:, first:]
    reach = places.shape[1] - 1 - seen.flip(-1).long().argmax(-1)
    expected = real[:, None] & (places[:, None] <= reach[..., None])
    if window is not None:
        expected &= places[..., None] - places[:, None] < window
    if bool(((seen != expected) & prunable[..., None]).any()):
        raise NotImplementedError(
            "recall knows masks that are causal or open to the end of a block, within windows, and this prompt's is not"
        )
    return reach


def _open(mask: torch.Tensor) -> torch.Tensor:
    """``(B, S, S)`` bool of a bool or additive ``(B, 1, S, S)``."""
    if mask.shape[-1] != mask.shape[-2]:
        raise MechanismError("reading the masks of a prompt", f"one of shape {tuple(mask.shape)}")
    return opened(mask[:, 0])


__all__ = ["RecallStore", "check_family"]
