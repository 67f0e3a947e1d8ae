"""What one side of a comparison did, on disk, and how two sides differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

EQUAL = "equal"
LOGITS_TOLERANCE = 1e-4  # of the largest logit; fp32 through three layers differs by about 1e-6


@dataclass(frozen=True)
class Side:
    """One implementation's answer to one case.

    ``held`` ``(steps, layers, rows, K/V heads, columns)`` bool: which tokens the cache holds behind the prefill and
    behind each step; of vision tokens ``(1, 1, 1, images, tokens)``. ``logits`` ``(steps, rows, vocabulary)`` fp32:
    what each of these computed at its last token; None where only the choice is compared.
    """

    held: Tensor
    logits: Tensor | None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"held": self.held.to(torch.uint8).contiguous()}
        if self.logits is not None:
            tensors["logits"] = self.logits.float().contiguous()
        save_file(tensors, file, metadata={"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, file: Path) -> Side:
        """Raises ValueError: the file has other tensors than ``save`` writes."""
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 no dictionary
            facts = json.loads((opened.metadata() or {}).get("facts", "{}"))
        if "held" not in tensors or not tensors.keys() <= {"held", "logits"}:
            raise ValueError(f"{file.name} must hold 'held' and perhaps 'logits', got {sorted(tensors)}")
        return cls(tensors["held"].bool(), tensors.get("logits"), facts)


def compare(ours: Side, peer: Side) -> dict[str, Any]:
    """How two sides of one case differ, as a JSON-safe record; ``equal`` is the verdict.

    Equal are sides that hold the same tokens in every layer, row and head at every step (a ``line`` of them), answer
    the same tokens, and whose logits differ by at most ``LOGITS_TOLERANCE`` of the largest.

    Raises:
        ValueError: the sides are of different shapes, so they did not run the same case, or answered NaN.
    """
    if ours.held.shape != peer.held.shape:
        raise ValueError(f"sides must hold one shape, got {tuple(ours.held.shape)} and {tuple(peer.held.shape)}")
    lines = (ours.held == peer.held).all(-1)
    wrong = (~lines).nonzero()
    record: dict[str, Any] = {
        "equal": bool(lines.all()),
        "lines": lines.numel(),
        "lines_equal": int(lines.sum()),
        "held": int(peer.held.sum()),
        "held_by_both": int((ours.held & peer.held).sum()),
        "first_difference": None if not len(wrong) else dict(zip(("step", "layer", "row", "head"), wrong[0].tolist())),
    }
    if ours.logits is None and peer.logits is None:
        return record
    if ours.logits is None or peer.logits is None or ours.logits.shape != peer.logits.shape:
        shapes = [None if side.logits is None else tuple(side.logits.shape) for side in (ours, peer)]
        raise ValueError(f"logits of the sides must have one shape, got {shapes[0]} and {shapes[1]}")
    if ours.logits.isnan().any() or peer.logits.isnan().any():
        raise ValueError("logits must be numbers, got NaN")
    answers = ours.logits.argmax(-1) == peer.logits.argmax(-1)
    difference = (ours.logits - peer.logits).abs().max().item()
    tolerance = LOGITS_TOLERANCE * peer.logits.abs().max().item()
    record["equal"] &= bool(answers.all()) and difference <= tolerance
    return record | {
        "tokens": answers.numel(),
        "tokens_equal": int(answers.sum()),
        "logits_difference": difference,
        "logits_tolerance": tolerance,
    }


def judge(expected: str, *, ours: Side, peer: Side, published: Side, described: Side | None) -> dict[str, Any]:
    """A case's record and, under ``as_expected``, whether nothing in it is new.

    We must do what was published; the peer must equal us where ``expected`` is `EQUAL` and differ elsewhere, there as
    ``described`` if that says how.
    """
    pairs = {"published": (ours, published), "peer": (ours, peer)}
    if described is not None:
        pairs["described"] = (described, peer)
    record = {name: compare(*sides) for name, sides in pairs.items()}
    as_expected = (
        record["published"]["equal"]
        and record["peer"]["equal"] == (expected == EQUAL)
        and ("described" not in record or record["described"]["equal"])
    )
    return {"expected": expected, "as_expected": as_expected, **record}
