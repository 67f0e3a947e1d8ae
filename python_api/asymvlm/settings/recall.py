"""How dropped vision tokens come back, and which settings of vision pruning can bring them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from asymvlm.methods import BeforeMethod, SelectingMethod

if TYPE_CHECKING:
    from asymvlm.settings.policies import VisionPruning

DEVICE, HOST = "device", "host"
CHOICES = {"store": (DEVICE, HOST), "vision_kv": ("recompute", "keep"), "unwanted": ("stay", "leave")}


@dataclass(frozen=True)
class Recall:
    """What a later question about the same images does to the vision tokens in the cache.

    The question ranks all tokens of the images into the budget anew; those of them that were dropped come back at their
    original positions. K and V of text, separators included, never change.

    Args:
        store: where the merged embeddings of the images' tokens lie meanwhile: ``"device"`` or ``"host"`` memory.
        vision_kv: ``"recompute"``: where a row's tokens change, K and V of all vision tokens that it holds from then on
            are computed together, so that they attend to each other as in a first prefill. ``"keep"``: only those that
            come back are computed. The others never see them, which costs answers; the result equals a run over the
            whole conversation in which a column is open from the turn on in which it came back.
        unwanted: vision tokens that the question does not rank into the budget ``"stay"``, and the cache grows, or
            ``"leave"`` it, and it holds what the budget and ``background`` say; they may come back like any.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    store: str = DEVICE
    vision_kv: str = "recompute"
    unwanted: str = "stay"

    def __post_init__(self) -> None:
        for name, wanted in CHOICES.items():
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name} must be {wanted[0]!r} or {wanted[1]!r}, got {getattr(self, name)!r}")
        if self.leaves and not self.recomputes:
            raise ValueError("unwanted='leave' needs vision_kv='recompute': K and V that are kept saw what would leave")

    @property
    def recomputes(self) -> bool:
        return self.vision_kv == "recompute"

    @property
    def leaves(self) -> bool:
        return self.unwanted == "leave"


def as_recall(recall: object) -> Recall | None:
    """What a caller gave as ``recall``, as settings; None for False.

    Raises:
        ValueError: for anything else than a bool, a place of `Recall.store` or a `Recall`.
    """
    if isinstance(recall, Recall):
        return recall
    if recall in (DEVICE, HOST):
        return Recall(store=str(recall))
    if recall is True:
        return Recall()
    if recall is False or recall is None:
        return None
    raise ValueError(f"recall must be True, False, 'device', 'host' or Recall(...), got {recall!r}")


def check_recall(vision: VisionPruning) -> None:
    """Refuse settings beside which a later question cannot rank dropped tokens.

    Raises:
        ValueError: naming the value found and the value wanted.
    """
    if not vision.recall:
        return
    method = vision.scored_by
    told = method.name or type(method).__name__
    needs = ("needs_tower", "needs_tower_attention", "needs_grid", "needs_pixels")
    if not isinstance(method, BeforeMethod) or isinstance(method, SelectingMethod) or not method.needs_text:
        raise ValueError(f"recall needs a method that scores tokens against a question before layer 0, got {told!r}")
    if found := [name for name in needs if getattr(method, name)]:
        raise ValueError(f"recall keeps embeddings alone, and the method {told!r} asks for more ({', '.join(found)})")
    if isinstance(vision.text, torch.Tensor):
        raise ValueError("recall reads the text of later turns: text must be 'all' or 'user', got a mask of one prompt")
    if vision.positions != "keep":
        raise ValueError(f"recall needs the original positions: positions must be 'keep', got {vision.positions!r}")
