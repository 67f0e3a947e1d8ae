"""easy-vqa: 5000 drawn images of one coloured shape, and 48 248 questions with one of 13 answers (Victor Zhou, 2019).

The set's own test images are the test. Its training images are cut by number: 3400 train the model, 100 validate, 200
train scorers, 300 set budgets. A sample is an image with one question, so that samples do not depend on each other.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bench.public.packages import fetch
from bench.tinyvlm.evaluate import Samples, padded
from bench.tinyvlm.glyphs import EOS, SPECIAL, TOKENS
from bench.tinyvlm.pages import CELL, GRID, SIDE
from bench.tinyvlm.questions import Turn

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
# fmt: off
WORDS = ("what", "is", "the", "of", "shape", "color", "image", "in", "does", "contain", "a", "there", "present", "not",
         "no", "yes")
# fmt: on
VOCABULARY = (*SPECIAL, *WORDS, *SHAPES, *COLOURS)
TOKEN_ID = {token: number for number, token in enumerate(VOCABULARY)}
KINDS = ("colour", "shape", "yes/no")
MIX = {"colour": 0.4, "shape": 0.4, "yes/no": 0.2}
FLAT = 12  # sum over channels up to which a pixel is background

Split = Literal["train", "validation", "scorer", "calibration", "test"]
PARTS = {"train": (0, 3400), "validation": (3400, 3500), "scorer": (3500, 3700), "calibration": (3700, 4000)}


@dataclass(frozen=True)
class Pictures:
    """Images of a split. Attributes:

    pixels: ``(n, 96, 96, 3)`` uint8, enlarged from 64 x 64 as the processor does.
    turns: the questions about each.
    """

    pixels: np.ndarray
    turns: list[list[Turn]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.turns)

    @functools.cached_property
    def covered(self) -> np.ndarray:
        """``(n, 144)`` bool, `covered` of every image."""
        return np.concatenate([covered(part) for part in np.array_split(self.pixels, -(-len(self) // 100))])


def turn_of(question: str, answer: str) -> Turn:
    kind = "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes/no"
    return Turn(kind, question.removesuffix("?"), answer, (-1,))


def encode(text: str) -> list[int]:
    """Tokens of a text, as the checkpoint's tokenizer cuts it.

    Raises:
        KeyError: on a word that no question of the set has.
    """
    return [TOKEN_ID[word] for word in TOKENS.findall(text)]


def turn_ids(turn: Turn) -> tuple[list[int], list[int]]:
    """Tokens of the question, and of the answer with its end of text."""
    return encode(turn.question), [*encode(turn.answer), EOS]


def pictures(split: Split, folder: Path | None = None) -> Pictures:
    """All images of a split with all their questions, fetched where they are not there."""
    from PIL import Image

    place = (folder or fetch("easy-vqa")) / "easy_vqa" / "data" / ("test" if split == "test" else "train")
    turns: dict[int, list[Turn]] = {}
    for question, answer, number in json.loads((place / "questions.json").read_text()):
        turns.setdefault(number, []).append(turn_of(question, answer))
    low, high = PARTS.get(split, (0, len(turns)))
    numbers = [number for number in sorted(turns) if low <= number < high]
    size, box = (SIDE, SIDE), Image.Resampling.BOX
    drawn = [Image.open(place / "images" / f"{number}.png").convert("RGB").resize(size, box) for number in numbers]
    return Pictures(np.stack([np.asarray(image) for image in drawn]), [turns[number] for number in numbers])


def make_samples(
    split: Split, count: int, *, seed: int = 0, mix: dict[str, float] = MIX, folder: Path | None = None
) -> Samples:
    """``count`` samples of a split: images in a random order, each again only once all have had their turn, with one
    question whose kind is drawn by ``mix`` among those that the image has. The same arguments give the same samples.
    """
    found, rng = pictures(split, folder), np.random.default_rng([seed, 20])
    rounds = -(-count // len(found))
    chosen = np.concatenate([rng.permutation(len(found)) for _ in range(rounds)])[:count]
    turns = [_one(found.turns[number], rng, mix) for number in chosen]
    pages = Pictures(found.pixels[chosen], [[turn] for turn in turns])
    return padded(pages, turns, [turn_ids(turn) for turn in turns])


def _one(turns: list[Turn], rng: np.random.Generator, mix: dict[str, float]) -> Turn:
    there = [kind for kind in mix if any(turn.kind == kind for turn in turns)]
    shares = np.array([mix[kind] for kind in there])
    kind = there[rng.choice(len(there), p=shares / shares.sum())]
    of_kind = [turn for turn in turns if turn.kind == kind]
    return of_kind[rng.integers(len(of_kind))]


def facts(turns: list[Turn]) -> tuple[str | None, str | None]:
    """Shape and colour of an image as far as its questions and answers tell them."""
    told: dict[bool, str | None] = {True: None, False: None}
    for turn in turns:
        words = turn.question.split()
        named = [word for word in words if word in SHAPES or word in COLOURS]
        if turn.kind == "yes/no":
            there = (turn.answer == "yes") != bool(re.search(r"\b(not|no)\b", turn.question))
            named = named if there else []
        else:
            named = [*named, turn.answer]
        for word in named:
            told[word in SHAPES] = word
    return told[True], told[False]


def guessed(known: list[list[Turn]], asked: list[Turn]) -> np.ndarray:
    """``(n,)`` bool: is the answer right that the words of each question suggest? The most common answer to the same
    words in ``known``, the first of the alphabet where several are; wrong where no question is in these words.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in itertools.chain.from_iterable(known):
        counts[turn.question][turn.answer] += 1
    best = {question: min(found, key=lambda answer: (-found[answer], answer)) for question, found in counts.items()}
    return np.array([best.get(turn.question) == turn.answer for turn in asked])


def covered(pixels: np.ndarray) -> np.ndarray:
    """``(n, 144)`` bool: cells of ``(n, 96, 96, 3)`` images that hold a pixel which is not background.

    The background is an image's median colour by channel: no shape fills half of one.
    """
    values = pixels.astype(np.int64)
    drawn = np.abs(values - np.median(values, axis=(1, 2), keepdims=True)).sum(-1) > FLAT
    return drawn.reshape(-1, GRID, CELL, GRID, CELL).any((2, 4)).reshape(-1, GRID * GRID)


__all__ = ["COLOURS", "KINDS", "MIX", "PARTS", "SHAPES", "VOCABULARY", "Pictures", "Split", "covered", "encode",
           "facts", "guessed", "make_samples", "pictures", "turn_ids", "turn_of"]  # fmt: skip
