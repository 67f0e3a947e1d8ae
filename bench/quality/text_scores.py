"""What a better choice of generated tokens rests on: accumulation, a list for each layer or head, the recent window.

``python -m bench.quality.text_scores`` takes transcripts as `bench.quality.caches` does, on the same pages, with the
prompt protected. Each setting is written as soon as it is measured, to ``bench/results/quality/text-scores.json``, and
not measured again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from asymvlm import TextEviction
from bench.harness import environment, results
from bench.harness.tables import markdown
from bench.quality.caches import HELD, read_out
from bench.quality.scorers import load_model
from bench.quality.statistics import rate, record
from bench.quality.tables import caption, cell
from bench.quality.transcripts import transcript_samples
from bench.tinyvlm.model import CHECKPOINT

FILE = Path(__file__).resolve().parents[1] / "results" / "quality" / "text-scores.json"
SHARES, RECENTS = (0.5, 0.9), (0, 6, 12, 16)
SCORES, SCOPES = ("last", "accumulated"), ("decoder", "layer", "head")
PLACE = ("device", "time", "commit", "torch", "transformers", "python", "threads")


def settings() -> Iterator[tuple[str, TextEviction]]:
    """Title and setting of each case. A window of all that is held is one case: nothing is left to choose."""
    for share in SHARES:
        held = int(HELD * share)
        for recent in (recent for recent in RECENTS if recent <= held):
            for score in SCORES:
                for scope in SCOPES:
                    title = f"{score}, {scope}, {recent} recent kept"
                    title = f"any, {recent} recent kept" if recent == held else title
                    policy = TextEviction(held, 1.0, recent=recent, score=score, scope=scope)
                    yield f"{title} @ {share:g}", policy
        yield f"default @ {share:g}", TextEviction(held, 1.0)
        yield f"default, threshold {HELD} @ {share:g}", TextEviction(HELD, share)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Settings whose title holds this; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Pages.")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Results file.")] = FILE,
) -> None:
    """Measure what is not in the results yet."""
    torch.set_num_threads(threads)
    model, lines = load_model(CHECKPOINT), transcript_samples(samples, seed=101)
    truth = lines.labels[:, int(lines.question.sum(1)[0]) :]
    wanted = truth >= 0
    place = {key: value for key, value in environment.describe("cpu").items() if key in PLACE}
    command = f"python -m bench.quality.text_scores {shlex.join(sys.argv[1:])}".strip()
    run = results.add_run(out, {"command": command, **place, "samples": samples})
    for title, policy in settings():
        if title in results.load(out)["cases"] or not any(part in title for part in only or [""]):
            continue
        found, held = read_out(model, lines, {"text": policy})
        right = ((found == truth) & wanted).sum(1).div(wanted.sum(1)).numpy()
        results.add_case(out, title, {"run": run, **record(rate(right)), "bytes": held // samples})
        print(f"{title}: {right.mean():.3f}", flush=True)


def block(name: str, folder: Path) -> str:
    """The text of a marker of docs/measurements.md."""
    content = results.load(folder / FILE.name)
    if not content["cases"]:
        return "Nothing measured yet."
    rows: dict[str, dict[str, Any]] = {}
    for key, case in content["cases"].items():
        title, _, share = key.rpartition(" @ ")
        rows.setdefault(title, {})[share] = case
    head = ("score, who shares a list, recent window", *(f"{int(HELD * share)} held" for share in SHARES))
    order = sorted(rows, key=lambda title: -rows[title].get(f"{SHARES[0]:g}", {"mean": 0})["mean"])
    table = [
        [title, *(cell(rows[title][f"{s:g}"]) if f"{s:g}" in rows[title] else "-" for s in SHARES)] for title in order
    ]
    run = {**content["runs"][0], "command": "python -m bench.quality.text_scores"}
    text = (
        "Share of right tokens in transcripts; a new token takes the place of one of those held. With threshold "
        f"{HELD}, tokens go in bulk until as many are left."
    )
    return f"{caption(run, run)}\n\n{text}\n\n{markdown(head, table)}"


BLOCKS = {"text-scores": block}

__all__ = ["BLOCKS", "block", "settings"]

if __name__ == "__main__":
    typer.run(main)
