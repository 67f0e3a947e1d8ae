"""A tiny saved checkpoint (16 vision tokens) and a page, as files: what a command line is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from random_checkpoint import QUESTION as QUESTION  # for the tests
from random_checkpoint import Size, build

TINY = Size()
GRID, VISION_TOKENS = 4, 16
KV_BYTES_PER_TOKEN = 2 * TINY.layers * TINY.width * 4  # K and V, fp32


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoint; shared, so a test that changes it takes `own_checkpoint`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(folder, TINY)
    return folder


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that differs from patch to patch and is not square."""
    image = Image.new("RGB", (120, 160), "white")
    draw = ImageDraw.Draw(image)
    for line in range(8):
        draw.rectangle((10, 10 + 18 * line, 20 + 11 * line, 18 + 18 * line), fill=(20 * line, 30, 200 - 20 * line))
    file = tmp_path_factory.mktemp("page") / "page.png"
    image.save(file)
    return file
