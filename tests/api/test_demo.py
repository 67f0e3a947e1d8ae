"""The demo runs without network from nothing, and its checkpoint survives interruption and company."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint import TINY, checkpoint, page
from PIL import Image

from bench.demo import __main__ as demo
from bench.demo import checkpoint as demo_checkpoint
from bench.demo.checkpoint import Size, build, cached_checkpoint
from bench.demo.page import render_page

__all__ = ["checkpoint", "page"]  # fixtures


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "asymvlm"


def run_demo(*arguments: object) -> int:
    return demo.console.run_app(demo.app, [str(argument) for argument in arguments], name="demo")


def test_demo_prunes_half_of_576_tokens_and_draws_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RUNS", 1)
    assert run_demo("--output", tmp_path / "out") == 0
    text = capsys.readouterr().out
    for words in (
        "weights are random",
        "576",
        "288",
        "50.0%",
        "K/V cache after prefill, measured",
        "time to first token",
        "demo_heatmap.png",
    ):
        assert words in text
    with Image.open(tmp_path / "out" / "demo_page.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(render_page()))
    with Image.open(tmp_path / "out" / "demo_heatmap.png") as heatmap:
        assert len(np.unique(np.asarray(heatmap.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
    assert [path.name for path in cache.iterdir()] == [f"demo-{demo_checkpoint.VERSION}"], "no scratch folder is left"


def test_demo_takes_the_readers_own(
    cache: Path, checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_demo(
        "--model", checkpoint, "--image", page, "--question", "Is [it]?", "--keep", "0.25", "--output", tmp_path
    )
    text = capsys.readouterr().out
    assert code == 0
    assert "Is [it]?" in text
    assert "K = 4 of 16" in text
    assert "random" not in text, "nothing is known of the reader's weights"
    assert not cache.exists(), "the demo's own checkpoint is not needed"


def test_demo_tells_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for arguments, words in (
        (("--image", tmp_path / "none.png"), "none.png: no such file"),
        (("--output", tmp_path / "file"), "wanted a folder"),
        (("--output", tmp_path), "set XDG_CACHE_HOME"),
    ):
        assert run_demo(*arguments) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_build_is_seeded_and_leaves_the_random_state(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    build(tmp_path, TINY)
    assert digest(tmp_path) == digest(checkpoint)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoint_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached_checkpoint(TINY)
    monkeypatch.setattr(demo_checkpoint, "build", lambda *_: pytest.fail("built again"))
    assert cached_checkpoint(TINY) == folder


def test_interrupted_build_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, size: Size) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo_checkpoint, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached_checkpoint(TINY)
    assert list(cache.iterdir()) == []
    assert (cached_checkpoint(TINY) / "model.safetensors").is_file()


def test_of_two_builds_at_once_the_first_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(folder: Path, size: Size) -> None:
        (folder / "config.json").write_text("second")
        winner = cache / f"demo-{demo_checkpoint.VERSION}"
        winner.mkdir()
        (winner / "config.json").write_text("first")

    monkeypatch.setattr(demo_checkpoint, "build", beaten)
    folder = cached_checkpoint(TINY)
    assert (folder / "config.json").read_text() == "first"
    assert list(cache.iterdir()) == [folder]
