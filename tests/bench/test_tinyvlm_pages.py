"""Pages and questions: the same seed gives the same pixels, no page is in two splits, and answers are on the page."""

from __future__ import annotations

import numpy as np
import pytest

from bench.tinyvlm.glyphs import BLANK, GLYPHS, TOKEN_ID, VOCABULARY, bitmaps, decode, encode
from bench.tinyvlm.model import build_processor, to_model_pixels
from bench.tinyvlm.pages import CELL, GRID, SPLITS, Layout, make_pages, words
from bench.tinyvlm.questions import KINDS, ask, conversation


def test_same_seed_same_page_other_seed_other_page() -> None:
    first, again, other = (make_pages(seed, 3, "test") for seed in (1, 1, 2))
    assert first.layouts == again.layouts
    assert np.array_equal(first.pixels, again.pixels)
    assert first.layouts != other.layouts


def test_a_page_belongs_to_one_split_whatever_the_seed() -> None:
    written = {}
    for split in SPLITS:
        pages = make_pages(0, 300, split)
        assert {layout.split for layout in pages.layouts} == {split}
        written[split] = {(layout.slots, layout.keys, layout.values) for layout in pages.layouts}
    union = set().union(*written.values())
    assert len(union) == sum(len(part) for part in written.values())


def test_shifted_twins_share_a_split() -> None:
    twins = [Layout((3, 7), "KM", ("482", "113"), shift) for shift in (0, 1)]
    assert twins[0].split == twins[1].split
    assert twins[0].entries[0].cell + 1 == twins[1].entries[0].cell


def test_every_glyph_differs_from_every_other() -> None:
    shapes = [bitmaps()[TOKEN_ID[glyph]].tobytes() for glyph in GLYPHS]
    assert len(set(shapes)) == len(GLYPHS)
    assert all(bitmaps()[TOKEN_ID[glyph]].sum() > 3 for glyph in GLYPHS)


def test_cells_hold_what_the_layout_says() -> None:
    pages = make_pages(4, 5, "train", noise=0)
    for number, layout in enumerate(pages.layouts):
        text = words(pages, number).replace("\n", "")
        for entry in layout.entries:
            assert text[entry.cell : entry.cell + 5] == f"{entry.key}:{entry.value}"
        cells = pages.pixels[number].reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(-1, CELL * CELL)
        inked = cells.min(1) < cells.max(1)
        assert inked[pages.glyph[number] != BLANK].all()
        assert 0 < inked[pages.glyph[number] == BLANK].mean() < 0.5, "specks in some empty cells"


@pytest.mark.parametrize("arguments", [("test", (0, 3)), ("test", (5, 4)), ("test", (3, 27)), ("tests", (3, 12))])
def test_wrong_arguments_are_named(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"tests|entries"):
        make_pages(0, 1, *arguments)


def test_answers_are_on_the_page_where_the_cells_say() -> None:
    rng = np.random.default_rng(0)
    pages = make_pages(9, 20, "train")
    for number, layout in enumerate(pages.layouts):
        values = dict(zip(layout.keys, layout.values, strict=True))
        for kind in KINDS:
            turn = ask(rng, layout, kind)
            answer = encode(turn.answer)
            assert len(turn.cells) == len(answer)
            for token, cell in zip(answer, turn.cells, strict=True):
                assert cell < 0 or pages.glyph[number, cell] == token
            asked = turn.question[-1]
            expected = {
                "value": values.get(asked),
                "exists": "yes" if asked in values else "no",
                "count": f"{len(values):02d}",
                "list": layout.keys,
                "read": "".join(f"{key}:{value};" for key, value in values.items()),
            }
            assert turn.answer == expected[kind]
    with pytest.raises(ValueError, match="kind must be one of"):
        ask(rng, pages.layouts[0], "why")


def test_a_conversation_repeats_no_question_while_it_can() -> None:
    layout = make_pages(0, 1, "test", entries=(12, 12)).layouts[0]
    turns = conversation(np.random.default_rng(1), layout, {"value": 0.7, "count": 0.3}, 9)
    assert len(turns) == 9
    assert len({turn.question for turn in turns}) == 9


def test_tokenizer_cuts_as_training_does_and_forgives_a_question_mark() -> None:
    tokenizer = build_processor().tokenizer
    assert len(tokenizer) == len(VOCABULARY)
    for text in ("what is the value of K", "list all keys", "K:482;M:113;", "07", "is there key Q"):
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(text)
        assert tokenizer(text[0].upper() + text[1:] + "?", add_special_tokens=False).input_ids == encode(text)
    assert tokenizer.decode(encode("K:482;")) == decode(encode("K:482;")) == "K:482;"
    assert tokenizer.decode(encode("zebra"), skip_special_tokens=True) == ""


@pytest.mark.parametrize("scale", [1, 8])
def test_processor_undoes_the_scale_of_a_drawn_page(scale: int) -> None:
    pages = make_pages(2, 2, "test")
    images = [pages.image(number, scale) for number in range(2)]
    pixels = build_processor().image_processor(images, return_tensors="pt")["pixel_values"]
    assert (pixels - to_model_pixels(pages.pixels)).abs().max() < 1e-6
