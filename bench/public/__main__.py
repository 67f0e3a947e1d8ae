"""What pruning costs in answers on easy-vqa: ``python -m bench.public``, results in ``bench/results/public``.

Fetches the set, trains the model and its scorers where they are not in the cache yet, and measures. Parts: ``methods``
(every method that chooses before the decoder, at equal kept tokens), ``budgets`` (adaptive against uniform),
``generated`` (teacher forcing, which the other parts use, against ``generate``). Answers that an interrupted run
measured for the same model are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from asymvlm import VisionPruning
from asymvlm.app.session import InputError
from asymvlm.cli import console
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import UniformBudget
from bench.harness import environment, results
from bench.harness.registry import CACHE
from bench.public.easy_vqa import PARTS as SPLITS
from bench.public.easy_vqa import make_samples
from bench.public.scorers import PRESETS, SAMPLES, trained
from bench.public.study import KeptStudy, budgets, generated, methods
from bench.public.train import STAGES, EasyVqa
from bench.quality.scorers import RECIPES, load_model
from bench.tinyvlm.evaluate import Samples
from bench.tinyvlm.train import LOG, STATE, train

RESULTS = Path(__file__).resolve().parents[1] / "results" / "public"
MEASURED = ("methods", "budgets", "generated")
PLACE = ("device", "time", "commit", "torch", "transformers", "python", "threads")
WRITTEN = 200  # questions that are answered by `generate` too
OURS = RECIPES["default"].label


def model_folder(seed: int) -> Path:
    return CACHE / f"easy-vqa-model-{seed}"


def ready(folder: Path, seed: int) -> Any:
    """The model of ``folder``, trained where it is not there; an interrupted training goes on."""
    if not (folder / "config.json").is_file():
        train(EasyVqa, folder, seed, STAGES, resume=(folder / STATE).is_file())
    return load_model(folder)


def digest(folder: Path) -> str:
    """Tells models apart."""
    with (folder / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()[:12]


def asked(samples: Samples) -> str:
    """Tells sets of samples apart, by questions and pixels."""
    return hashlib.sha256(samples.text.numpy().tobytes() + samples.pages.pixels.tobytes()).hexdigest()[:12]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seed: Annotated[int, typer.Option(help="Seed of the model.")] = 0,
    part: Annotated[list[str] | None, typer.Option(help="Part to measure, all by default; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method to compare, all by default; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Test samples.")] = 1000,
    scorer_samples: Annotated[int, typer.Option(min=1, help="Training samples of a scorer.")] = SAMPLES,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves its own choice.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure the tables on easy-vqa."""
    console.hush_transformers(progress=False)
    if threads:
        torch.set_num_threads(threads)
    for wanted in part or ():
        if wanted not in MEASURED:
            raise InputError(f"--part: {wanted!r} found, wanted one of {', '.join(MEASURED)}")
    place = model_folder(seed)
    model = ready(place, seed)
    cache = place / "measured" / f"{digest(place)}-{scorer_samples}"
    scorers = {
        name: [trained(model, cache, name, number, scorer_samples) for number in seeds]
        for name, seeds in PRESETS.items()
    }
    weights = {RECIPES[name].label: [one.weight for one in many] for name, many in scorers.items()}
    test = make_samples("test", samples)
    study = KeptStudy(model, test, weights, folder=cache / f"test-{asked(test)}")
    for wanted in part or MEASURED:
        with console.err.status(f"measuring {wanted}"):
            found = _measure(wanted, study, scorers["default"], cache, place, method)
        file = out / ("easy-vqa.json" if seed == 0 else f"easy-vqa-{seed}.json")
        _write(file, wanted, {"samples": samples, "scorer_samples": scorer_samples, **found}, place)
        console.out.print(f"{wanted}: written to {file}", markup=False, soft_wrap=True)


def _measure(
    part: str, study: KeptStudy, scorers: list[Scorer], cache: Path, place: Path, names: list[str] | None
) -> dict[str, Any]:
    if part == "methods":
        return methods(study, OURS, names)
    if part == "budgets":
        return budgets(study, scorers, cache)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    first = make_samples("test", min(WRITTEN, len(study.samples)))
    found: dict[str, Any] = {}
    for ratio in (1.0, 0.22):
        vision = VisionPruning(scorers[0], UniformBudget(ratio))
        forced = KeptStudy(study.model, first, {}).measure("forced", [vision])[0]
        written = generated(study.model, first, vision, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        found[f"{ratio:g}"] = {
            "forced": int(forced.sum()),
            "written": int(written.sum()),
            "agree": int((forced == written).sum()),
        }
    return {"questions": len(first), "rates": found}


def _write(file: Path, part: str, found: dict[str, Any], place: Path) -> None:
    """Note the run, the training's last record among it, and what it measured."""
    last = [json.loads(line) for line in (place / LOG).read_text().splitlines()][-1]
    here = {key: value for key, value in environment.describe("cpu").items() if key in PLACE}
    command = f"python -m bench.public {shlex.join(sys.argv[1:])}".strip()
    images = {name: high - low for name, (low, high) in SPLITS.items()}
    run = results.add_run(file, {"command": command, **here, "training": last, "images": images})
    results.add_part(file, part, {"run": run, **found})


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.public"))
