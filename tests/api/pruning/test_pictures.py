"""An image of any mode reaches the model as a viewer shows it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from asymvlm.app.loading import open_image
from asymvlm.app.samples import Question
from asymvlm.app.session import InputError, Session
from asymvlm.cli import console
from asymvlm.files.pictures import PictureError, as_rgb


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
        (Image.fromarray(np.float32([[-0.2, 1], [1, 1]])), (102, 102, 102)),
        (Image.fromarray(np.full((2, 2), 32896.0, np.float32)), (128, 128, 128)),
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
    text = "word " * 60 + ":key: a\tb [bold]end[/bold]"
    console.print_text(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    "values,message",
    [
        (np.float32([[np.nan, 1.0]]), "page holds pixels that are NaN or infinite"),
        (np.float32([[-3.0, 1.0]]), r"page holds pixels from -3 to 1, wanted \[0, 255\]"),
        (np.float32([[-0.5, 7.0]]), "page holds pixels from -0.5 to 7"),
        (np.float32([[0.0, 1e9]]), r"page holds pixels from 0 to 1e\+09"),
        (np.int32([[-5, 100]]), "page holds pixels from -5 to 100"),
    ],
    ids=["nan", "below", "mixed", "above", "negative integers"],
)
def test_brightness_that_cannot_be_told_is_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=message):
        as_rgb(Image.fromarray(values), "page")
    Image.fromarray(values).save(tmp_path / "page.tiff")
    with pytest.raises(InputError, match=r"page.tiff holds pixels"):
        open_image(tmp_path / "page.tiff")


def test_the_transparent_value_of_deep_grey_shows_paper(tmp_path: Path) -> None:
    Image.fromarray(np.uint16([[700, 65535 // 5]])).save(tmp_path / "page.png", transparency=700)
    assert np.asarray(open_image(tmp_path / "page.png"))[0].tolist() == [[255] * 3, [51] * 3]


def test_images_given_from_python_are_composited_too() -> None:
    seen: list[Image.Image] = []

    class Processor:
        image_token = "<image>"

        def __call__(self, images: list[Image.Image], text: str, return_tensors: str) -> BatchFeature:
            seen.extend(images)
            return BatchFeature({"input_ids": [[1]]}, tensor_type="pt")

    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    session = Session("tiny", model, Processor())
    session.prepare([Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("L", (2, 2), 7)], "why")
    assert [pixel(image) for image in seen] == [(255, 255, 255), (7, 7, 7)]
    with pytest.raises(InputError, match="image 2 holds pixels that are NaN"):
        session.prepare([seen[0], Image.fromarray(np.float32([[np.nan]]))], "why")


@pytest.mark.parametrize(
    "name,content,advice",
    [
        ("page.pdf", b"%PDF-1.7 and so on", "a PDF, wanted an image: turn its page into one first"),
        ("empty.png", b"", "the file is empty"),
        ("notes.txt", b"hello", "not a format Pillow can read"),
    ],
)
def test_what_is_no_image_gets_its_own_advice(name: str, content: bytes, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=advice):
        open_image(tmp_path / name)


def test_an_address_and_a_bomb_get_their_own_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an address, wanted a file: download it first"):
        open_image("https://example.org/page.png")
    Image.new("L", (30, 30)).save(tmp_path / "page.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too large to open safely, wanted at most 200 pixels: scale it down"):
        open_image(tmp_path / "page.png")


def test_lines_are_not_broken_either(capsys: pytest.CaptureFixture[str]) -> None:
    line = "a decision " * 20
    console.print_line(line)
    assert capsys.readouterr().out == line + "\n"
