"""`asymvlm.evaluate` finds right what the quality bench finds right: by greedy answers, the bench by given ones."""

from __future__ import annotations

from pathlib import Path

import asymvlm
from bench.quality.evaluated import compare
from bench.quality.scorers import SCORERS, load_model
from bench.tinyvlm.evaluate import make_samples
from bench.tinyvlm.model import CHECKPOINT


def test_evaluate_and_the_bench_find_the_same_pages_right(tmp_path: Path) -> None:
    samples = make_samples("validation", 20, seed=4)
    scorer = asymvlm.Scorer.from_pretrained(SCORERS / "default-0")
    rows = compare(load_model(CHECKPOINT), samples, scorer, tmp_path)
    assert [row["differ"] for row in rows] == [0] * 7
    assert [(row["method"], row["keep"]) for row in rows][::2] == [
        ("full", 1.0), ("random", 0.25), ("cosine", 0.25), ("learned (default)", 0.25),
    ]  # fmt: skip
    assert all(row["evaluate"] == row["bench"] for row in rows)
    assert len({row["evaluate"] for row in rows}) > 3, "equal because they are right, not because all are one"
