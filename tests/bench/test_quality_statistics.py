"""The arithmetic behind the quality tables, against hand calculation, and the tables against their JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench import plot
from bench.quality import tables
from bench.quality.budgets import even_counts
from bench.quality.statistics import mcnemar, paired, rate, record


def test_rate_and_its_error_by_hand() -> None:
    right = np.array([True, True, True, False])
    found = rate(right)
    assert (found.mean, found.samples) == (0.75, 4)
    assert found.error == pytest.approx(math.sqrt(0.25 / 4))  # variance 0.25 with n - 1, over n
    runs = rate(np.stack([right, ~right]))
    assert (runs.mean, runs.error) == (0.5, 0.0), "a sample counts once, by the mean of its runs"


def test_pairing_sees_what_two_rates_cannot() -> None:
    first = np.arange(200) < 120
    second = np.arange(200) < 100
    found = paired(first, second)
    assert (found.better, found.worse) == (20, 0)
    assert found.difference == pytest.approx(0.1)
    assert found.error == pytest.approx(math.sqrt(0.09 / 199))
    assert found.error < math.hypot(rate(first).error, rate(second).error)
    assert found.p_value == pytest.approx(2 / 2**20)
    with pytest.raises(ValueError, match="200 and 3"):
        paired(first, second[:3])


@pytest.mark.parametrize("better,worse,wanted", [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (8, 2, 0.109375)])
def test_exact_test_by_hand(better: int, worse: int, wanted: float) -> None:
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(wanted)


def test_even_counts_add_up_and_are_even() -> None:
    counts = even_counts(4321, 100)
    assert int(counts.sum()) == 4321
    assert set(counts.tolist()) == {43, 44}
    assert int(counts[:50].sum()) in (2160, 2161), "the larger ones are spread out"


def measured(mean: float) -> dict:
    return {"mean": mean, "error": 0.01, "samples": 1000, "runs": [mean, mean]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = {"command": "python -m bench.quality", "device": "cpu", "time": "2026-01-01T00:00:00", "commit": "abc"}
    pair = {"difference": 0.25, "error": 0.02, "better": 30, "worse": 1, "p_value": 1e-6}
    uniform = {
        "full": measured(0.9),
        "rates": {"cosine": {"0.65": measured(0.5), "0.5": measured(0.4)}},
        "paired": [{"first": "cosine/0.5", "second": "spiral/0.5", **pair}],
    }
    content = {
        "schema": 1,
        "runs": [run | {"torch": "2", "transformers": "5"}],
        "parts": {"uniform": {"run": 0, "samples": 1000, **uniform}},
        "cases": {},
    }
    (tmp_path / "quality").mkdir()
    for name in ("seed-0", "seed-1"):
        (tmp_path / "quality" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_tables_say_what_was_measured(folder: Path) -> None:
    text = plot.table("quality-pruning", folder)
    assert "| cosine | 0.500 ± 0.010 | 0.400 ± 0.010 | 0.400, 0.400 |" in text
    assert "| cosine − spiral | +0.250 ± 0.020 |" in text
    assert "| seed 1 | 0.900 ± 0.010 | cosine | 0.500 ± 0.010 | 0.400 ± 0.010 |" in text
    assert "1000 test pages" in text
    assert "`python -m bench.quality`" in text
    assert plot.table("quality-budgets", folder) == "Nothing measured yet."
    with pytest.raises(SystemExit, match="quality-eviction"):
        plot.table("quality-speed", folder)


def test_committed_results_fill_every_table() -> None:
    for name in tables.BLOCKS:
        text = plot.table(name, plot.ROOT / "bench" / "results")
        assert (" ms |" if name == "quality-costs" else " ± ") in text, name


def test_records_are_json(tmp_path: Path) -> None:
    found = record(paired(np.arange(9) < 5, np.arange(9) < 4))
    assert json.loads(json.dumps(found)) == found
    assert found["p_value"] == 1.0
