"""Spreading along lines in a patched model: lines follow the grids, and on the small VLM it finds what it is for."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

import asymvlm
from asymvlm.models import adapter_for
from asymvlm.prompt.shorten import prune_prompt
from asymvlm.tokens.images import image_cells, read_images
from bench.quality.scorers import model_inputs
from bench.tinyvlm.evaluate import exact_match, features, make_samples
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION
from bench.tinyvlm.pages import GRID

IMAGE, VIDEO = 90, 91


def test_lines_follow_the_grids_of_every_kind() -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 2, VIDEO, VIDEO], [IMAGE, IMAGE, IMAGE, 3, 4, 5, 6, 7]])
    vision = (ids == IMAGE) | (ids == VIDEO)
    separators = torch.zeros_like(vision)
    separators[1, 2] = True
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    grids = {"image_token_id": [(2, 2), (1, 2)], "video_token_id": [(2, 1)]}
    lines = image_cells(ids, vision, separators, names, grids).line
    assert lines.tolist() == [[-1, 0, 0, 1, 1, -1, 3, 4], [2, 2, -1, -1, -1, -1, -1, -1]]
    alone = {"image_token_id": grids["image_token_id"]}
    assert image_cells(ids, vision, separators, names, alone).line[0, 6:].eq(-1).all()


def test_grids_of_the_columns_behind_a_cache_are_those_of_all_columns() -> None:
    ids = torch.tensor([[IMAGE, 1, *[2] * 60, IMAGE, IMAGE, VIDEO, VIDEO]])
    vision = (ids == IMAGE) | (ids == VIDEO)
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    grids = {"image_token_id": [(1, 1), (1, 2)], "video_token_id": [(2, 1)]}
    layout = (ids, vision, torch.zeros_like(vision), names, grids)
    images, by_row = read_images(layout, 1, 62)
    assert by_row == [[(1, 2), (2, 1)]]
    assert torch.equal(images, read_images(layout, 1)[0][:, 62:])


def test_a_model_without_known_grids_is_refused() -> None:
    model = tiny.build("llava")
    adapter = dataclasses.replace(adapter_for(model), grids=lambda model, inputs: {}, model_type="nameless")
    vision = asymvlm.VisionPruning(spread=asymvlm.Spread())
    with pytest.raises(ValueError, match=r"spread.*need the grid of an image's tokens, which the nameless adapter"):
        prune_prompt(model, adapter, vision, tiny.make_batch("llava", "single"), generating=False)
    with pytest.raises(ValueError, match="spread must be"):
        asymvlm.VisionPruning(spread=4)  # type: ignore[arg-type]


def test_spread_finds_values_at_a_sixth_of_the_tokens() -> None:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    samples = make_samples("validation", 20, seed=2, mix={"value": 1.0})
    inputs = model_inputs(samples, range(20), answers=False)
    right = {}
    for spread in (None, asymvlm.Spread()):
        vision = asymvlm.VisionPruning(budget=asymvlm.UniformBudget(0.15), spread=spread)
        with asymvlm.patch(model, vision=vision) as handle, torch.inference_mode():
            model(**inputs)
            index = handle.last.index
            kept = torch.zeros(20, inputs["input_ids"].shape[1], dtype=torch.bool).scatter_(1, index.clamp_min(0), True)
            kept = kept[:, 1 : 1 + NUM_VISION]
            assert (kept.sum(1) == NUM_VISION * 15 // 100).all()
            scores = handle.last.scores[:, 1 : 1 + NUM_VISION]
        right[spread] = exact_match(model, samples, features(model, samples), kept).sum()
        if spread is None:
            plain = scores
    lines = torch.arange(GRID).repeat_interleave(GRID).expand(20, -1)
    assert torch.equal(scores, asymvlm.Spread().apply(plain, lines))
    assert right[None] < 10 < right[asymvlm.Spread()]
