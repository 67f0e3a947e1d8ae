"""The demo runs without network from a fresh clone and gives the right answer with half of the vision tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint import checkpoint, page
from PIL import Image

from bench.demo import __main__ as demo

__all__ = ["checkpoint", "page"]  # fixtures


def run_demo(*arguments: object) -> int:
    return demo.console.run_app(demo.app, [str(argument) for argument in arguments], name="demo")


@pytest.mark.slow
def test_demo_answers_rightly_with_all_and_with_half_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RUNS", 1)
    assert run_demo("--output", tmp_path / "out") == 0
    text = " ".join(capsys.readouterr().out.split())  # however wide the terminal is
    own = demo.example()
    for words in (
        f"full {own.answer} pruned {own.answer}",
        f"The page says {own.answer}: all tokens right, the kept tokens right.",
        "This model is tiny",
        "K = 72 of 144",
        "50.0%",
        "K/V cache after prefill, measured",
        "time to first token",
        "demo_heatmap.png",
    ):
        assert words in text
    with Image.open(tmp_path / "out" / "demo_page.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(own.page))
    with Image.open(tmp_path / "out" / "demo_heatmap.png") as heatmap:
        assert len(np.unique(np.asarray(heatmap.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


@pytest.mark.slow
def test_demo_says_that_an_answer_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RUNS", 1)
    assert run_demo("--output", tmp_path, "--keep", "0.01") == 0
    assert "all tokens right, the kept tokens WRONG" in " ".join(capsys.readouterr().out.split())


def test_demo_takes_the_readers_own(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_demo(
        "--model", checkpoint, "--image", page, "--question", "Is [it]?", "--keep", "0.25", "--output", tmp_path
    )
    text = capsys.readouterr().out
    assert code == 0
    assert "Is [it]?" in text
    assert "K = 4 of 16" in text
    assert "tiny" not in text, "nothing is known of the reader's model"
    assert "page says" not in text


def test_demo_tells_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (("--image", tmp_path / "none.png"), "none.png: no such file"),
        (("--output", tmp_path / "file"), "wanted a folder"),
    ):
        assert run_demo(*arguments) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1
