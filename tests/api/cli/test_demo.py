"""The demo runs without network, answers rightly with half of the tokens and claims only what it measured."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint import checkpoint, page
from PIL import Image

from asymvlm.app.session import FirstToken
from asymvlm.cli import console
from asymvlm_kernels import UniformBudget
from bench import quality
from bench.demo import command as demo
from bench.demo import sample, timed
from bench.quality import __main__ as study

__all__ = ["checkpoint", "page"]  # fixtures

FASTER, SLOWER, UNCLEAR = "Pruning is faster", "Pruning is slower", "no clear difference"


def run_demo(*arguments: object) -> int:
    return console.run_app(demo.app, [str(argument) for argument in arguments], name="demo")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())  # however wide the terminal is


@pytest.mark.slow
def test_demo_answers_rightly_and_states_the_stored_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--output", tmp_path / "out", "--size", "tiny") == 0
    text = printed(capsys)
    own = sample.example()
    stored = json.loads((Path(quality.__file__).parents[1] / "results" / "quality" / "seed-0.json").read_text())
    uniform = stored["parts"]["uniform"]
    rate = uniform["rates"]["learned (default)"]["0.5"]
    for words in (
        f"full {own.answer} pruned {own.answer}",
        f"The page says {own.answer}: both answers are right.",
        f"One sample: {own.chosen}",
        f"over all {uniform['samples']} pages: {uniform['full']['mean']:.3f} with all tokens",
        f"{rate['runs'][0]:.3f} with keep 0.5 and this scorer (mean of 3 scorers {rate['mean']:.3f}",
        stored["runs"][uniform["run"]]["command"],
        "This model is tiny",
        "K = 72 of 144",
        "50.0%",
        "random weights: shows time and bytes, not answers",
        "K/V cache after prefill, measured",
        "demo_heatmap.png",
    ):
        assert words in text
    assert "wrong" not in text.lower()
    with Image.open(tmp_path / "out" / "demo_page.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(own.page))
    with Image.open(tmp_path / "out" / "demo_heatmap.png") as heatmap:
        assert len(np.unique(np.asarray(heatmap.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    (row,) = re.findall(r"fastest to slowest run │ +(\d+) to (\d+) ms │ +(\d+) to (\d+) ms", text)
    full_low, full_high, pruned_low, pruned_high = map(int, row)
    assert sum(words in text for words in (FASTER, SLOWER, UNCLEAR)) == 1
    assert FASTER not in text or pruned_high <= full_low
    assert SLOWER not in text or full_high <= pruned_low


def test_times_are_claimed_only_where_no_runs_overlap() -> None:
    def words(full: list[float], pruned: list[float]) -> str:
        return timed.verdict(FirstToken(full, pruned, None, None))

    assert f"{FASTER} to the first token: 2.00 times" in words([10.0, 8.0, 12.0], [5.0, 4.0, 7.9])
    assert UNCLEAR in words([10.0, 8.0, 12.0], [5.0, 4.0, 8.0])
    assert UNCLEAR in words([5.0, 4.0, 8.0], [10.0, 8.0, 12.0])
    assert SLOWER in words([5.0, 4.0, 7.9], [10.0, 8.0, 12.0])


def test_timing_counts_bytes_tokens_and_pairs() -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    found = timed.time_first_token(timed.SIZES["tiny"], UniformBudget(0.5), said.append, pairs=5, seconds=0.0)
    timing = found.first_token
    assert len(timing.full_ms) == len(timing.pruned_ms) == timed.LEAST, "a slow machine stops early, not before that"
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, bytes
    assert (timing.full_kv_bytes, timing.pruned_kv_bytes) == (52 * per_token, 44 * per_token)
    assert (found.vision_tokens, found.kept) == (16, 8)
    assert len(said) == 1 + 2 * (1 + timed.LEAST), "a line of progress for the build and for every run"
    assert torch.get_num_threads() == threads


def test_the_page_is_one_of_those_that_the_stored_rate_counts() -> None:
    defaults = inspect.signature(study.main).parameters
    assert defaults["pages"].default == sample.PAGES_SEED
    assert defaults["samples"].default == sample.PAGES
    samples = sample.make_samples("test", sample.PAGES, seed=sample.PAGES_SEED)
    first = [turn.kind for turn in samples.turns].index("value")
    assert sample.example().answer == sample.example(first).answer == samples.turns[first].answer
    assert f"page {first} of" in sample.example().chosen


def test_a_rate_is_read_from_the_file_or_said_to_be_missing(tmp_path: Path) -> None:
    rate = {"mean": 0.25, "error": 0.125, "runs": [0.5, 0.0]}
    part = {"run": 1, "samples": 7, "full": {"mean": 0.75}, "rates": {"learned (default)": {"0.5": rate}}}
    file = tmp_path / "stored.json"
    file.write_text(json.dumps({"runs": [{}, {"command": "the command"}], "parts": {"uniform": part}}))
    text = sample.measured_rate(0.5, file)
    for words in ("7 pages", "0.750 with all", "0.500 with keep 0.5", "2 scorers 0.250 ± 0.125", "by: the command"):
        assert words in text
    assert "Keep 0.3 was not measured over many pages (measured: 0.5)" in sample.measured_rate(0.3, file)
    assert "(measured: nothing)" in sample.measured_rate(0.5, tmp_path / "none.json")


def test_demo_says_that_the_answers_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--output", tmp_path, "--keep", "0.01", "--size", "none")
    assert run_demo(*arguments) == 0
    text, own = printed(capsys), sample.example()
    assert f"The page says {own.answer}; the model answers {own.answer} with all tokens" in text
    assert "Try a larger --keep" in text
    assert "not measured over many pages" in text
    assert "random weights" not in text
    assert run_demo(*arguments, "--question", f" {own.question[:-1]}K ") == 0
    text = printed(capsys)
    assert "The answers differ. Try a larger --keep" in text
    assert "page says" not in text, "what the page says about the reader's question is not known"


def test_demo_takes_the_readers_own(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_demo(
        "--model", checkpoint, "--image", page, "--question", "Is [it]?", "--keep", "0.25", "--output", tmp_path
    )
    text = printed(capsys)
    assert code == 0
    assert "Is [it]?" in text
    assert "K = 4 of 16" in text
    assert "This model is tiny" not in text, "nothing is known of the reader's model"
    assert "page says" not in text
    assert "The answers agree." in text or "The answers differ." in text
    assert "time to first token, median" in text
    assert sum(words in text for words in (FASTER, SLOWER, UNCLEAR)) == 1
    assert "random weights" not in text, "the reader's model is timed itself"


def test_demo_tells_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (("--image", tmp_path / "none.png"), "none.png: no such file"),
        (("--output", tmp_path / "file"), "wanted a folder"),
        (("--page", 1000), "--page: 1000 found, wanted a number from 0 to 999"),
        (("--page", 1, "--image", tmp_path / "none.png"), "exclude each other"),
        (("--size", "9B"), "--size: '9B' found, wanted one of tiny, 0.1B, none"),
    ):
        assert run_demo(*arguments) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1
