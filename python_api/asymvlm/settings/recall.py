"""Which settings of vision pruning can bring dropped tokens back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asymvlm.methods import BeforeMethod, SelectingMethod

if TYPE_CHECKING:
    from asymvlm.settings.policies import VisionPruning

PLACES = ("device", "host")


def check_recall(vision: VisionPruning) -> None:
    """Refuse settings beside which a later question cannot rank dropped tokens.

    Raises:
        ValueError: naming the value found and the value wanted.
    """
    if not isinstance(vision.recall, bool) and vision.recall not in PLACES:
        raise ValueError(f"recall must be True, False, 'device' or 'host', got {vision.recall!r}")
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
