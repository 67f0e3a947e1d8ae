"""`asymvlm heatmap` writes the picture of what was pruned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint import GRID, QUESTION, VISION_TOKENS, checkpoint, page
from PIL import Image

from asymvlm.report import plot
from asymvlm_cli import main

__all__ = ["checkpoint", "page"]  # fixtures


def arguments(checkpoint: Path, page: Path, output: Path, *more: str) -> list[str]:
    return [
        *("heatmap", "--model", str(checkpoint), "--image", str(page)),
        *("--question", QUESTION, "--output", str(output), *more),
    ]


@pytest.mark.slow
def test_png_and_json_agree_with_the_run(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.png"
    assert main(arguments(checkpoint, page, file, "--keep", "0.25", "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["output"] == str(file)
    assert record["grid"] == [GRID, GRID]
    assert (record["kept"], record["vision_tokens"]) == (4, VISION_TOKENS)
    assert (
        main(["run", *arguments(checkpoint, page, file)[1:7], "--keep", "0.25", "--max-new-tokens", "1", "--json"]) == 0
    )
    assert record["gap"] == json.loads(capsys.readouterr().out)["report"]["gap"][0]
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    outline = np.abs(pixels / 255 - np.array([11, 87, 164]) / 255).max(-1) < 0.1  # plot.OUTLINE
    assert plot.OUTLINE == "#0b57a4"
    assert outline.sum() > 500, "kept patches are outlined"


@pytest.mark.slow
def test_several_images_are_drawn_to_numbered_files(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(checkpoint, page, tmp_path / "out.png", "--image", str(page), "--keep", "0.5", "--json")
    assert main(asked) == 0
    record = json.loads(capsys.readouterr().out)
    assert [image["output"] for image in record["images"]] == [str(tmp_path / f"out-{n}.png") for n in (1, 2)]
    assert (record["kept"], record["vision_tokens"]) == (VISION_TOKENS, 2 * VISION_TOKENS)
    assert all(Path(image["output"]).stat().st_size > 10_000 for image in record["images"])


@pytest.mark.slow
def test_different_budgets_draw_different_pictures(checkpoint: Path, page: Path, tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    for file, keep in ((few, "0.25"), (many, "0.75")):
        assert main(arguments(checkpoint, page, file, "--keep", keep)) == 0
    assert few.read_bytes() != many.read_bytes()


def test_keeping_everything_has_no_scores_to_draw(
    checkpoint: Path, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(checkpoint, page, tmp_path / "out.png", "--keep", "1")) == 2
    stderr = capsys.readouterr().err
    assert "wanted a ratio below 1" in stderr
    assert [line.split()[0] for line in stderr.splitlines()] == ["loading", "asymvlm:"]
    assert not (tmp_path / "out.png").exists()
