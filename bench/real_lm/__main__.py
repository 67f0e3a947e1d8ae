"""Perplexity of a real language model under a bounded cache: ``python -m bench.real_lm``.

Texts are forced token by token through `asymvlm.patch` with each setting of `entries`. Each setting and round of blocks
is written as soon as it is measured, to ``bench/results/real_lm/<model>.json``, and not measured again; several
processes may work on one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.harness import environment, results
from bench.real_lm import texts
from bench.real_lm.entries import ENTRIES, FORCED, FULL, HELD, PROMPT, SCORED, SHARES, equal_settings
from bench.real_lm.forced import load, loss
from bench.real_lm.weights import SOURCES, unpacked

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real_lm"
PLACE = ("device", "time", "commit", "torch", "transformers", "python", "threads")


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SOURCES)}.")] = "gemma-3-270m",
    rounds: Annotated[list[int] | None, typer.Option(help="Rounds of blocks, repeatable.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Retention, repeatable; all by default.")] = None,
    only: Annotated[str, typer.Option(help="Settings whose title holds this.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure what is not in the results yet."""
    torch.set_num_threads(threads)
    network, tokenizer = load(unpacked(model))
    whole, file = texts.texts(), out / f"{model}.json"
    run = _begin(file, list(whole))
    for number in rounds or [0]:
        ids = texts.blocks(tokenizer, whole, number, PROMPT + FORCED)
        wanted: list[tuple[str, dict[str, Any]]] = [(FULL, {})]
        for part in share or SHARES:
            wanted += [(f"{one.title} @ {part:g}", equal_settings(one, part)) for one in ENTRIES if only in one.title]
        for title, settings in wanted:
            key = f"{title} # {number}"
            if key in results.load(file)["cases"]:
                continue
            found, tokens = loss(network, ids, settings)
            with _alone(file):
                case = {"run": run, "loss": [round(one, 5) for one in found], "tokens": round(tokens, 2)}
                results.add_case(file, key, case)
            print(f"{key}: {sum(found) / len(found):.4f}, {tokens:.2f} tokens", flush=True)


def _begin(file: Path, names: list[str]) -> int:
    """Note the run; its number."""
    place = {key: value for key, value in environment.describe("cpu").items() if key in PLACE}
    sizes = {"prompt": PROMPT, "forced": FORCED, "held": HELD, "scored": SCORED, "blocks": texts.BLOCKS}
    with _alone(file):
        command = f"python -m bench.real_lm {shlex.join(sys.argv[1:])}".strip()
        return results.add_run(file, {"command": command, **place, **sizes, "texts": names})


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """No other process writes the file meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


if __name__ == "__main__":
    typer.run(main)
