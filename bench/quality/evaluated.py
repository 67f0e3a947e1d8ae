"""The bench's right answers once more, by `asymvlm.evaluate`: ``python -m bench.quality.evaluated``.

The bench judges by teacher forcing, `evaluate` by what a model writes about an image and the words of a question. Both
must find the same samples right, one by one. A random order is drawn from a prompt's tokens, and the bench's prompts
hold the answer too: so its tokens are drawn without the answer here, and judged by the bench.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import asymvlm
from asymvlm import Evaluation, VisionPruning
from asymvlm.cli import console
from asymvlm.methods import AsymVLM, RandomTokens
from asymvlm.prompt.columns import marked_columns
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import UniformBudget
from bench.harness import environment, results
from bench.quality.answers import IMAGE
from bench.quality.scorers import SCORERS, load_model, model_inputs
from bench.quality.study import FULL, Study
from bench.tinyvlm.evaluate import ROWS, Samples, exact_match, make_samples
from bench.tinyvlm.model import CHECKPOINT, build_processor

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality" / "evaluated.json"
RATIOS = (0.5, 0.25)
SAMPLES, PAGES = 1000, 100  # of the tables
LEARNED, LONGEST = "learned (default)", 16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def evaluated(model: Any, samples: Samples, scorer: Scorer, out: Path, batch_size: int = 50) -> Evaluation:
    """The samples as a user gives them: pictures, questions, answers."""
    given = [
        {"image": samples.pages.image(number), "question": turn.question, "answer": turn.answer}
        for number, turn in enumerate(samples.turns)
    ]
    methods = {"random": RandomTokens(), "cosine": "cosine", LEARNED: AsymVLM(scorer.weight)}
    return asymvlm.evaluate(
        model,
        build_processor(),
        given,
        methods,
        RATIOS,
        "exact",
        out=out,
        batch_size=batch_size,
        max_new_tokens=LONGEST,
        progress=False,
    )


def right_answers(found: Evaluation, method: str, keep: float) -> np.ndarray:
    """``(n,)`` bool."""
    lines = [line for line in found.answers if (line["method"], line["keep"]) == (method, keep)]
    return np.array([line["scores"]["exact"] == 1 for line in lines])


def taught(study: Study, method: str, keep: float) -> np.ndarray:
    """``(n,)`` bool by the bench."""
    if method == "random":
        return exact_match(study.model, study.samples, keep=drawn(study.model, study.samples, keep)).numpy()
    return study.right[FULL][0] if method == FULL else study.uniform(method, keep)[0]


@torch.inference_mode()
def drawn(model: Any, samples: Samples, keep: float) -> torch.Tensor:
    """``(n, 144)`` bool: the tokens that stay by a random order of prompts without answers."""
    kept = []
    with asymvlm.patch(model, VisionPruning(method=RandomTokens(), budget=UniformBudget(keep))) as handle:
        for rows in torch.arange(len(samples)).split(ROWS):
            model(**model_inputs(samples, rows.tolist(), answers=False), use_cache=False)
            assert handle.last is not None
            kept.append(marked_columns(handle.last.index, handle.last.columns_before)[:, IMAGE])
    return torch.cat(kept)


def compare(model: Any, samples: Samples, scorer: Scorer, out: Path) -> list[dict[str, Any]]:
    """One object a setting: the shares that both find right, and on how many samples they disagree."""
    study = Study(model, samples, {LEARNED: [scorer.weight]}, seeds=1)
    found = evaluated(model, samples, scorer, out)
    rows = []
    for row in found.rows:
        ours, theirs = (
            judge(row["method"], row["keep"])
            for judge in (
                lambda method, keep: right_answers(found, method, keep),
                lambda method, keep: taught(study, method, keep),
            )
        )
        told = {"evaluate": round(row["metrics"]["exact"]["value"], 4), "bench": round(float(theirs.mean()), 4)}
        rows.append({"method": row["method"], "keep": row["keep"], **told, "differ": int((ours != theirs).sum())})
    return rows


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Checkpoint of bench.tinyvlm.train.")] = CHECKPOINT,
    scorer: Annotated[Path, typer.Option(help="Learned scorer.")] = SCORERS / "default-0",
    samples: Annotated[int, typer.Option(min=2, help="Test samples.")] = SAMPLES,
    pages: Annotated[int, typer.Option(min=0, help="Seed of the test pages.")] = PAGES,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
) -> None:
    """Compare, and write down."""
    console.hush_transformers(progress=False)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        asked = make_samples("test", samples, seed=pages)
        rows = compare(load_model(model), asked, Scorer.from_pretrained(scorer), Path(folder))
    place = {name: environment.describe("cpu")[name] for name in ("device", "time", "commit", "torch", "transformers")}
    given = {"samples": (samples, SAMPLES), "pages": (pages, PAGES), "threads": (threads, 1)}
    more = [f"--{name} {value}" for name, (value, usual) in given.items() if value != usual]
    command = " ".join(["python -m bench.quality.evaluated", *more])
    results.save(out, {"command": command, **place, "samples": samples, "rows": rows})
    for row in rows:
        console.print_line(f"{row['method']} {row['keep']}: {row['evaluate']}, {row['bench']}, {row['differ']} differ")


if __name__ == "__main__":
    sys.exit(console.run_app(app, None, name="python -m bench.quality.evaluated"))
