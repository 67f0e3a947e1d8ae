"""An image of any mode reaches the model as a viewer shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asymvlm.loading import open_image
from asymvlm.pictures import as_rgb
from asymvlm.samples import Question


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


@pytest.mark.parametrize(
    "image,expected",
    [
        (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 0)).convert("La"), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 32896, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 200, np.int32)), (200, 200, 200)),
        (Image.fromarray(np.full((2, 2), 65535, np.int32)), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 0.6, np.float32)), (153, 153, 153)),
        (Image.fromarray(np.full((2, 2), 153.0, np.float32)), (153, 153, 153)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert pixel(as_rgb(image)) == expected
    assert pixel(Question((image,), "why", ()).open()[0]) == expected


def test_a_transparent_palette_shows_paper(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 3)
    image.putpalette([9] * 768)
    image.save(tmp_path / "page.png", transparency=3)
    assert pixel(open_image(tmp_path / "page.png")) == (255, 255, 255)


@pytest.mark.parametrize(
    "name,image,expected",
    [
        ("clear.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0)), 255),
        ("deep.png", Image.fromarray(np.full((2, 2), 25700, np.uint16)), 100),
        ("float.tiff", Image.fromarray(np.full((2, 2), 0.2, np.float32)), 51),
    ],
)
def test_files(name: str, image: Image.Image, expected: int, tmp_path: Path) -> None:
    image.save(tmp_path / name)
    assert pixel(open_image(tmp_path / name)) == (expected,) * 3


def test_an_animated_image_says_which_frame_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    frames[0].save(tmp_path / "page.gif", save_all=True, append_images=frames[1:])
    assert pixel(open_image(tmp_path / "page.gif")) == (10, 10, 10)
    assert [record.message for record in caplog.records] == [
        f"image {tmp_path / 'page.gif'} is animated: frame 1 of 2 is used"
    ]


def test_answers_are_not_broken_at_a_terminals_width(capsys: pytest.CaptureFixture[str]) -> None:
    from asymvlm.cli import console

    text = "word " * 60 + ":key: a\tb [bold]end[/bold]"
    console.print_text(text)
    assert capsys.readouterr().out == text + "\n"
