"""Measure what pruning and eviction cost in answers: ``python -m bench.quality``, results in ``bench/results/quality``.

Parts: ``uniform`` (controls, cosine and learned scorers at every keep ratio), ``methods`` (all methods of the library
at equal kept tokens), ``costs`` (work, bytes and time of those), ``budgets`` (adaptive against uniform), ``eviction``
(transcripts and conversations), ``caches`` (all methods of the cache at equal bytes), ``beyond`` (ideas that are not in
the paper), ``safety`` (the recommended settings, and pages that they were not calibrated on), ``recall`` (tokens that
come back in a dialogue). Each part is written as soon as it is measured, and ``--part`` repeats some of them. The
scorers come from ``python -m bench.quality.scorers``.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from asymvlm.app.session import InputError
from asymvlm.cli import console
from asymvlm.settings.scorer import Scorer
from bench.harness import environment, results
from bench.quality.beyond import beyond
from bench.quality.budgets import adaptive, gaps
from bench.quality.caches import caches
from bench.quality.conversations import conversations
from bench.quality.methods import compared, costs
from bench.quality.recall import recalled
from bench.quality.safety import safety
from bench.quality.scorers import PRESETS, RECIPES, SCORERS, load_model
from bench.quality.study import Study, uniform
from bench.quality.transcripts import transcript_samples, transcripts
from bench.tinyvlm.evaluate import make_samples
from bench.tinyvlm.model import CHECKPOINT

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"
PARTS = ("uniform", "methods", "costs", "budgets", "eviction", "caches", "beyond", "safety", "recall")
SAMPLES, TRANSCRIPTS = 1000, 300
METHODS = {name: RECIPES[name].label for name in PRESETS}  # in every table; the other recipes are for `beyond`
PAPER, OURS = METHODS.values()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read_scorers(folder: Path) -> dict[str, list[Scorer]]:
    """Scorers of a folder by recipe, the folders being named ``<recipe>-<seed>``, in order of seed.

    Raises:
        InputError: if there are none.
    """
    found: dict[str, list[Scorer]] = defaultdict(list)
    for path in sorted(folder.glob("*-*/config.json")):
        found[path.parent.name.rpartition("-")[0]].append(Scorer.from_pretrained(path.parent))
    if not found:
        raise InputError(f"--scorers: {folder} holds none, run python -m bench.quality.scorers")
    return dict(found)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Checkpoint of bench.tinyvlm.train.")] = CHECKPOINT,
    scorers: Annotated[Path, typer.Option(help="Folder of bench.quality.scorers.")] = SCORERS,
    name: Annotated[str, typer.Option(help="Name of the results file.")] = "seed-0",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    part: Annotated[list[str] | None, typer.Option(help="Part to measure, all by default; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Test samples.")] = SAMPLES,
    runs: Annotated[int, typer.Option(min=0, help="Scorers of each recipe, the first ones; 0 takes all.")] = 0,
    pages: Annotated[int, typer.Option(min=0, help="Seed of the test pages; transcripts take the next.")] = 100,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the calibration's measurements.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves its own choice.")] = 0,
) -> None:
    """Measure the quality tables."""
    console.hush_transformers(progress=False)
    if threads:
        torch.set_num_threads(threads)
    for wanted in part or ():
        if wanted not in PARTS:
            raise InputError(f"--part: {wanted!r} found, wanted one of {', '.join(PARTS)}")
    found = {recipe: many[: runs or None] for recipe, many in read_scorers(scorers).items()}
    network = load_model(model)
    weights = {METHODS[preset]: [one.weight for one in found[preset]] for preset in METHODS if preset in found}
    study = Study(network, make_samples("test", samples, seed=pages), weights)
    for wanted in part or PARTS:
        with console.err.status(f"measuring {wanted}"):
            measured = _measure(wanted, study, found, samples, cache, pages)
        _write(out / f"{name}.json", wanted, measured, samples)
        console.out.print(f"{wanted}: written to {out / name}.json", markup=False, soft_wrap=True)


def _measure(
    part: str, study: Study, scorers: dict[str, list[Scorer]], samples: int, cache: Path | None, pages: int
) -> dict[str, Any]:
    if part == "uniform":
        learned = study.weights.get(OURS, [None])[0]
        return uniform(study) | {"gaps": gaps(study, learned)}
    if part == "methods":
        return compared(study, OURS)
    if part == "costs":
        return costs(study)
    if part == "budgets":
        return adaptive(study, scorers["default"], cache=cache, progress=False)
    if part == "caches":
        lines = transcript_samples(min(samples, TRANSCRIPTS), seed=pages + 1)
        return caches(study.model, lines) | {"samples": len(lines)}
    if part == "recall":
        return recalled(study.model, samples, study.weights.get(OURS, [None])[0], seed=pages)
    if part == "eviction":
        lines = transcript_samples(min(samples, TRANSCRIPTS), seed=pages + 1)
        return {
            "transcripts": transcripts(study.model, lines) | {"samples": len(lines)},
            "conversations": conversations(study.model, samples) | {"samples": samples},
        }
    if part == "safety":
        recipe = "default" if "default" in scorers else next(iter(scorers))
        return {"recipe": recipe, **safety(study.model, scorers[recipe], samples, pages, cache=cache)}
    variants = {
        RECIPES[name].label if name in RECIPES else name: [one.weight for one in many]
        for name, many in scorers.items()
        if name not in METHODS
    }
    return beyond(study, PAPER, {**{name: study.weights[name] for name in study.weights}, **variants})


def _write(file: Path, part: str, measured: dict[str, Any], samples: int) -> None:
    content = results.load(file)
    place = {
        key: value
        for key, value in environment.describe("cpu").items()
        if key in ("device", "time", "commit", "torch", "transformers", "python", "threads")
    }
    content["runs"].append({"command": f"python -m bench.quality {shlex.join(sys.argv[1:])}".strip(), **place})
    content["parts"][part] = {"run": len(content["runs"]) - 1, "samples": samples, **measured}
    results.save(file, content)


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.quality"))
