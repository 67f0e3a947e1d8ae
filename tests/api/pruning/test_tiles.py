"""Tiles are drawn where their processor cut them; prompts are written by transformers' own processors."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import FAMILIES
from transformers import Idefics3Processor, Llama4Processor, Ovis2Processor
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor
from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image, _prompt_split_image

from asymvlm import UniformBudget
from asymvlm.models import registered
from asymvlm.report import plot
from asymvlm.report.pruning import PruningReport
from asymvlm.report.tiles import Page, pages, texts_in_front

TOKENS = 4  # of a grid, 2 x 2
TILINGS = {"one", "whole first", "whole last", "tags", "separators", "ovis", "canvas", "unknown"}


def in_front(prompt: str, image_token: str) -> list[str]:
    """The texts in front of the runs of an image's placeholder."""
    return re.split(f"(?:{re.escape(image_token)}){{{TOKENS}}}", prompt)[:-1]


def idefics3(rows: int, columns: int) -> list[str]:
    writer = SimpleNamespace(
        fake_image_token="<fake>", global_image_tag="<global-img>", image_token="<image>", image_seq_len=TOKENS
    )
    inputs = {"rows": [[rows]], "cols": [[columns]]}
    return in_front(Idefics3Processor.replace_image_token(writer, inputs, 0), "<image>")


def smolvlm(rows: int, columns: int) -> list[str]:
    words = ("<fake>", "<image>", "<global-img>")
    split = _prompt_split_image(TOKENS, rows, columns, *words) if rows else _prompt_single_image(TOKENS, *words)
    return in_front(split, "<image>")


def lfm2_vl(rows: int, columns: int) -> list[str]:
    writer = SimpleNamespace(
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        image_token="<image>",
    )
    return in_front(
        Lfm2VlProcessor._build_image_tokens(writer, max(rows, 1), max(columns, 1), TOKENS, TOKENS, True, True),
        "<image>",
    )


def llama4(rows: int, columns: int) -> list[str]:
    return in_front(Llama4Processor._prompt_split_image(None, (max(rows, 1), max(columns, 1)), TOKENS), "<|patch|>")


def ovis2(rows: int, columns: int) -> list[str]:
    writer, grids = SimpleNamespace(image_seq_length=TOKENS), torch.tensor([[max(rows, 1), max(columns, 1)]])
    return in_front(Ovis2Processor.replace_image_token(writer, {"grids": grids}, 0), "<IMG_ATOM>")


WRITERS = {"idefics3": idefics3, "smolvlm": smolvlm, "lfm2_vl": lfm2_vl, "llama4": llama4, "ovis2": ovis2}


@pytest.mark.parametrize("family", WRITERS)
def test_prompts_of_every_family_that_writes_its_tiles(family: str) -> None:
    """Two images, 2 x 3 tiles and one that was not cut, in either order."""
    write, tiling = WRITERS[family], registered(family).tiling
    cut, plain = write(2, 3), write(0, 0)
    assert (len(cut), len(plain)) == (7, 1)
    first_whole = tiling == "ovis"
    tiles = tuple(range(1, 7) if first_whole else range(6))
    expected = Page(2, 3, tiles, 0 if first_whole else 6, padded=tiling == "separators")
    grids = [(2, 2)] * 8
    sizes = [(300, 200)] * 2
    assert pages(tiling, grids, [*cut, *plain], sizes, None) == [expected, Page(1, 1, (7,))]
    moved = Page(2, 3, tuple(n + 1 for n in tiles), 1 if first_whole else 7, padded=tiling == "separators")
    assert pages(tiling, grids, [*plain, *cut], sizes, None) == [Page(1, 1, (0,)), moved]
    with pytest.raises(ValueError, match=r"the prompt was changed|do not fill"):
        pages(tiling, grids[:-2], [*cut[:4], *plain, *plain], sizes, None)


@pytest.mark.parametrize(
    "module", ["got_ocr2.image_processing_pil_got_ocr2", "cohere2_vision.image_processing_cohere2_vision"]
)
def test_tiles_by_the_size_of_an_image(module) -> None:
    """InternVL, Aya Vision and GOT-OCR share a processor, Command A Vision has one of its own."""
    if "pil" not in module:
        pytest.importorskip("torchvision")
    module = importlib.import_module(f"transformers.models.{module}")
    processor: Any = type("ImageProcessor", (), {"__module__": module.__name__})()
    processor.size, processor.min_patches, processor.max_patches = {"height": 448, "width": 448}, 1, 12
    sizes = [(1344, 896), (448, 448)]
    columns, rows = module.get_optimal_tiled_canvas((896, 1344), (448, 448), 1, 12)
    assert (columns, rows) == (3, 2)
    found = pages("canvas", [(2, 2)] * 8, [""] * 8, sizes, processor)
    assert found == [Page(2, 3, (0, 1, 2, 3, 4, 5), 6), Page(1, 1, (7,))]
    assert pages("canvas", [(2, 2)] * 2, [""] * 2, sizes, processor) == [Page(1, 1, (0,)), Page(1, 1, (1,))]
    with pytest.raises(ValueError, match="9 tiles of 2 images were found"):
        pages("canvas", [(2, 2)] * 9, [""] * 9, sizes, processor)
    with pytest.raises(ValueError, match="does not tell how it cuts an image"):
        pages("canvas", [(2, 2)] * 8, [""] * 8, sizes, SimpleNamespace(size=processor.size))


def test_views_and_what_is_not_known() -> None:
    sizes = [(30, 20)] * 2
    assert pages("whole first", [(2, 2), (4, 6), (2, 2), (0, 0)], [""] * 4, sizes, None) == [
        Page(1, 1, (1,), 0),
        Page(1, 1, (2,)),
    ]
    assert pages("whole last", [(4, 6), (2, 2)], [""] * 2, sizes[:1], None) == [Page(1, 1, (0,), 1)]
    assert pages("unknown", [(2, 2)] * 2, [""] * 2, sizes, None) == [Page(1, 1, (0,)), Page(1, 1, (1,))]
    with pytest.raises(ValueError, match="it is not known how this family's 3 tiles lie on 1 images"):
        pages("whole first", [(2, 2)] * 3, [""] * 3, sizes[:1], None)
    with pytest.raises(ValueError, match="it is not known how this family's 5 tiles lie on 2 images"):
        pages("unknown", [(2, 2)] * 5, [""] * 5, sizes, None)


def test_every_family_says_how_its_tiles_lie() -> None:
    assert all(registered(name).tiling in TILINGS for name in FAMILIES)


def report(grids: list[tuple[int, int]], tiling: str) -> PruningReport:
    """One row: text of three tokens in front of each grid; scores count up, odd ones are kept."""
    columns, scores = sum(3 + h * w for h, w in grids), []
    for height, width in grids:
        scores += [-torch.inf] * 3
        scores += [float(len(scores) + n) for n in range(height * width)]
    kept = [place for place, score in enumerate(scores) if score > -torch.inf and place % 2]
    return PruningReport(
        lengths_before=torch.tensor([columns]),
        lengths_after=torch.tensor([len(kept)]),
        num_vision=torch.tensor([columns - 3 * len(grids)]),
        counts=torch.tensor([len(kept)]),
        gaps=torch.tensor([0.5]),
        scores=torch.tensor([scores]),
        index=torch.tensor([kept]),
        budget=UniformBudget(0.5),
        text_config=None,
        has_text=torch.tensor([True]),
        columns_before=columns,
        image_grids=[grids],
        tiling=tiling,
    )


def test_a_page_is_put_together_from_its_tiles() -> None:
    told = report([(1, 2)] * 5, "tags")
    scores, kept, grid = plot.page_grid(told, Page(2, 2, (0, 1, 2, 3), 4))
    assert grid == (2, 4)
    assert scores.tolist() == [[3, 4, 8, 9], [13, 14, 18, 19]]
    assert kept.tolist() == [[True, False, False, True], [True, False, False, True]]
    image = Image.new("RGB", (80, 40), "white")
    figure = plot.report_heatmap(told, image, page=Page(2, 2, (0, 1, 2, 3), 4))
    title = "importance gap 0.500, 4 of 8 vision tokens kept; of the whole view beside it 1 of 2"
    assert figure.get_suptitle() == title
    with pytest.raises(ValueError, match="images make 5 grids, tiles and whole views: page="):
        plot.report_heatmap(told, image)
    with pytest.raises(ValueError, match="tiles must have one size"):
        plot.page_grid(report([(1, 2), (2, 2)], "tags"), Page(1, 2, (0, 1)))


def test_texts_are_read_between_the_grids() -> None:
    told = report([(1, 2), (2, 2), (0, 0)], "tags")
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    assert texts_in_front(told, torch.arange(15)[None], tokenizer) == ["0 1 2", "5 6 7", ""]


def test_padding_is_paper() -> None:
    """A page of 90 x 20 on 3 x 2 tiles: wide, so what is missing is below."""
    canvas = Page(2, 3, tuple(range(6)), padded=True).canvas(Image.new("RGB", (90, 20), "black"))
    assert canvas.size == (90, 60)
    assert [canvas.getpixel(at) for at in ((89, 19), (0, 20))] == [(0, 0, 0), (255, 255, 255)]
    page = Image.new("RGB", (90, 20))
    assert Page(2, 3, tuple(range(6))).canvas(page) is page
