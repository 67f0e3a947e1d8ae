"""Training batches of easy-vqa: an image, some of its vision tokens, and several of its questions side by side.

The questions of an image stand in one row but do not see each other, and each begins at the same position: an earlier
answer would give a later one away ("what is the blue shape?").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.public.easy_vqa import TOKEN_ID, Pictures, facts, turn_ids
from bench.tinyvlm.batches import IGNORED
from bench.tinyvlm.glyphs import BLANK, PAD
from bench.tinyvlm.model import NUM_VISION, to_model_pixels
from bench.tinyvlm.pages import GRID
from bench.tinyvlm.questions import Turn

TEXT = 56  # text tokens of a row: about six questions with their answers
LEAD = 0.5  # in the draw of a row's questions, of those that the shape itself answers: nine in ten of the others say no
NOTHING = -1  # no turn; no meaning
KEPT = {16: 0.25, 36: 0.25, 72: 0.2, NUM_VISION: 0.3}  # numbers of vision tokens, and how often they are drawn


@dataclass(frozen=True)
class Batch:
    """Attributes, with B images, K kept vision tokens, T text tokens:

    pixels: ``(B, 3, 96, 96)`` float32. text: ``(B, T)`` ids. labels: ``(B, T)``, the id where an answer token stands,
    else -100. turn: ``(B, T)``, the number of the question that a token belongs to, -1 for padding. offset: ``(B, T)``,
    its place in it. kept: ``(B, K)`` ascending vision tokens. shown: ``(B, 144)`` bool, cells that the shape covers.
    meaning: ``(B, 144, 2)``, the tokens of shape and colour where the shape is, else that of an empty cell; -1 where
    no question tells.
    """

    pixels: torch.Tensor
    text: torch.Tensor
    labels: torch.Tensor
    turn: torch.Tensor
    offset: torch.Tensor
    kept: torch.Tensor
    shown: torch.Tensor
    meaning: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """``(B, 1 + K + T)``: where every token would stand with all vision tokens and its question alone."""
        begin = torch.zeros(len(self.text), 1, dtype=torch.int64)
        return torch.cat([begin, 1 + self.kept, 1 + NUM_VISION + self.offset], 1)

    @property
    def visible(self) -> torch.Tensor:
        """``(B, S, S)`` bool, S = 1 + K + T: a text token sees the image and its own question."""
        count = 1 + self.kept.shape[1]
        image = torch.full((len(self.text), count), -2)
        turn = torch.cat([image, self.turn], 1)
        return (turn[:, :, None] == turn[:, None]) | (turn[:, None] == -2)


def make_batch(found: Pictures, key: list[int], count: int, kept: int, text: int = TEXT) -> Batch:
    """``count`` different images of ``found``, half of them mirrored. The same key gives the same batch."""
    rng = np.random.default_rng(key)
    chosen = rng.choice(len(found), count, replace=False)
    pixels = found.pixels[chosen]
    mirrored = rng.random(count) < 0.5
    pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
    turns = [found.turns[number] for number in chosen]
    cells = found.covered[chosen].reshape(count, GRID, GRID)
    shown = np.where(mirrored[:, None, None], cells[:, :, ::-1], cells).reshape(count, NUM_VISION)
    rows = [_row(rng, some, text) for some in turns]
    ids, labels, turn, offset = (torch.tensor(part) for part in zip(*rows, strict=True))
    order = np.argsort(-(2.0 * shown + rng.random(shown.shape)), axis=1, kind="stable")  # the shape first
    index = torch.from_numpy(np.sort(order[:, :kept], axis=1))
    shown_ = torch.from_numpy(shown)
    return Batch(to_model_pixels(pixels), ids, labels, turn, offset, index, shown_, _meaning(shown_, turns))


def _row(rng: np.random.Generator, turns: list[Turn], length: int) -> tuple[list[int], ...]:
    """Text, labels, number and place of as many whole questions as ``length`` tokens hold."""
    lead = rng.random(len(turns)) + np.array([LEAD * (facts([turn]) != (None, None)) for turn in turns])
    parts: tuple[list[int], ...] = ([], [], [], [])
    for number in np.argsort(-lead, kind="stable"):
        question, answer = turn_ids(turns[number])
        tokens = [*question, *answer]
        if len(parts[0]) + len(tokens) <= length:
            said = [IGNORED] * len(question) + answer
            added = (tokens, said, [int(number)] * len(tokens), list(range(len(tokens))))
            for part, more in zip(parts, added, strict=True):
                part += more
    fills = (PAD, IGNORED, NOTHING, 0)
    return tuple(part + [fill] * (length - len(part)) for part, fill in zip(parts, fills, strict=True))


def _meaning(shown: torch.Tensor, turns: list[list[Turn]]) -> torch.Tensor:
    known = [[NOTHING if word is None else TOKEN_ID[word] for word in facts(some)] for some in turns]
    return torch.where(shown[..., None], torch.tensor(known)[:, None], BLANK)


__all__ = ["KEPT", "NOTHING", "TEXT", "Batch", "make_batch"]
