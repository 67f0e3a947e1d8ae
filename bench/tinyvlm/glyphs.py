"""A 5 x 7 pixel font and the vocabulary made of it: one token a glyph, one token a word of the questions."""

from __future__ import annotations

import functools
import re

import numpy as np

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = "#+*/-%=$"  # they fill lines that mean nothing
GLYPHS = DIGITS + ":" + LETTERS + SYMBOLS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>", "<blank>")  # <blank> names an empty patch, in training alone
# fmt: off
WORDS = ("what", "is", "the", "value", "of", "there", "key", "how", "many", "entries", "are", "list", "all", "keys",
         "read", "page", "yes", "no")
# fmt: on
VOCABULARY = (*SPECIAL, *WORDS, ";", *GLYPHS)
TOKEN_ID = {token: number for number, token in enumerate(VOCABULARY)}
PAD, BOS, EOS, IMAGE, UNKNOWN, BLANK = range(len(SPECIAL))
TOKENS = re.compile(r"[a-z]+|\S")  # how text is cut; the checkpoint's tokenizer cuts alike

HEIGHT, WIDTH = 7, 5
ART = {
    "0123456789:ABCD": """
        .###.  ..#..  .###.  .###.  ...#.  #####  ..##.  #####  .###.  .###.  .....  .###.  ####.  .###.  ####.
        #...#  .##..  #...#  #...#  ..##.  #....  .#...  ....#  #...#  #...#  ..#..  #...#  #...#  #...#  #...#
        #..##  ..#..  ....#  ....#  .#.#.  ####.  #....  ...#.  #...#  #...#  ..#..  #...#  #...#  #....  #...#
        #.#.#  ..#..  ..##.  ..##.  #..#.  ....#  ####.  ..#..  .###.  .####  .....  #####  ####.  #....  #...#
        ##..#  ..#..  .#...  ....#  #####  ....#  #...#  .#...  #...#  ....#  ..#..  #...#  #...#  #....  #...#
        #...#  ..#..  #....  #...#  ...#.  #...#  #...#  .#...  #...#  ...#.  ..#..  #...#  #...#  #...#  #...#
        .###.  .###.  #####  .###.  ...#.  .###.  .###.  .#...  .###.  .##..  .....  #...#  ####.  .###.  ####.
    """,
    "EFGHIJKLMNOPQRS": """
        #####  #####  .###.  #...#  .###.  ..###  #...#  #....  #...#  #...#  .###.  ####.  .###.  ####.  .####
        #....  #....  #...#  #...#  ..#..  ...#.  #..#.  #....  ##.##  ##..#  #...#  #...#  #...#  #...#  #....
        #....  #....  #....  #...#  ..#..  ...#.  #.#..  #....  #.#.#  ##..#  #...#  #...#  #...#  #...#  #....
        ####.  ####.  #.###  #####  ..#..  ...#.  ##...  #....  #.#.#  #.#.#  #...#  ####.  #...#  ####.  .###.
        #....  #....  #...#  #...#  ..#..  ...#.  #.#..  #....  #...#  #..##  #...#  #....  #.#.#  #.#..  ....#
        #....  #....  #...#  #...#  ..#..  #..#.  #..#.  #....  #...#  #..##  #...#  #....  #..#.  #..#.  ....#
        #####  #....  .###.  #...#  .###.  .##..  #...#  #####  #...#  #...#  .###.  #....  .##.#  #...#  ####.
    """,
    "TUVWXYZ#+*/-%=$": """
        #####  #...#  #...#  #...#  #...#  #...#  #####  .#.#.  .....  .....  ....#  .....  ##..#  .....  ..#..
        ..#..  #...#  #...#  #...#  #...#  #...#  ....#  .#.#.  ..#..  #.#.#  ....#  .....  ##..#  .....  .####
        ..#..  #...#  #...#  #...#  .#.#.  .#.#.  ...#.  #####  ..#..  .###.  ...#.  .....  ...#.  #####  #.#..
        ..#..  #...#  #...#  #.#.#  ..#..  ..#..  ..#..  .#.#.  #####  #####  ..#..  #####  ..#..  .....  .###.
        ..#..  #...#  #...#  #.#.#  .#.#.  ..#..  .#...  #####  ..#..  .###.  .#...  .....  .#...  #####  ..#.#
        ..#..  #...#  .#.#.  ##.##  #...#  ..#..  #....  .#.#.  ..#..  #.#.#  #....  .....  #..##  .....  ####.
        ..#..  .###.  ..#..  #...#  #...#  ..#..  #####  .#.#.  .....  .....  #....  .....  #..##  .....  ..#..
    """,
}


def encode(text: str) -> list[int]:
    """Token ids of ``text``, special tokens excluded. An unknown word is ``<unk>``."""
    return [TOKEN_ID.get(token, UNKNOWN) for token in TOKENS.findall(text)]


def decode(ids: list[int]) -> str:
    """The text of answer tokens, glued without spaces, as the checkpoint's tokenizer does."""
    return "".join(VOCABULARY[number] for number in ids if number >= len(SPECIAL))


@functools.cache
def bitmaps() -> np.ndarray:
    """``(len(VOCABULARY), 7, 5)`` float32, 1 where a glyph has ink; words and special tokens have none."""
    table = np.zeros((len(VOCABULARY), HEIGHT, WIDTH), np.float32)
    for glyphs, art in ART.items():
        lines = [line.split() for line in art.split("\n") if line.strip()]
        for column, glyph in enumerate(glyphs):
            table[TOKEN_ID[glyph]] = [[dot == "#" for dot in line[column]] for line in lines]
    return table
