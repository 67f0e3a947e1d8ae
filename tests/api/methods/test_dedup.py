"""Repeated patches: pictures of few kinds of patches, cut by the test itself."""

from __future__ import annotations

import pytest
import torch
from checks import uniform
from seen_prompts import see
from shared_models import build_once
from tiny import make_batch, make_video, vision_columns
from torch import Tensor

import asymvlm
from asymvlm import VisionPruning
from asymvlm.methods import Dedup

TOLD = ["llava", "llava_next", "llava_next_video", "gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl", "glm4v"]
TOLD += ["phi3_v"]


def few_kinds(family: str, batch: str) -> dict[str, Tensor]:
    """Inputs whose patches of 4 x 4 pixels are black or white: a token of four patches has 16 kinds."""
    inputs, draw = make_batch(family, batch), torch.Generator().manual_seed(3)
    pixels = inputs["pixel_values"]
    if pixels.ndim == 2:
        inputs["pixel_values"] = torch.randint(2, (len(pixels), 1), generator=draw).float().expand_as(pixels).clone()
        return inputs
    *front, height, width = pixels.shape
    kinds = torch.randint(2, (*front[:-1], 1, height // 4, width // 4), generator=draw).float()
    inputs["pixel_values"] = kinds.repeat_interleave(4, -1).repeat_interleave(4, -2).expand_as(pixels).clone()
    return inputs


def squares(picture: Tensor, side: int) -> list[bytes]:
    """The pixels of each square, row by row."""
    rows, columns = (length // side for length in picture.shape[-2:])
    found = [
        picture[:, side * r : side * (r + 1), side * c : side * (c + 1)] for r in range(rows) for c in range(columns)
    ]
    return [square.numpy().tobytes() for square in found]


def tokens_of(family: str, inputs: dict[str, Tensor]) -> list[bytes]:
    """The pixels under each vision token of a call, in the order of the prompt."""
    pixels, found = inputs["pixel_values"], []
    if family.startswith(("qwen", "glm")):
        return [pixels[4 * token : 4 * token + 4].numpy().tobytes() for token in range(len(pixels) // 4)]
    if family in ("llava", "gemma3", "paligemma"):
        side = pixels.shape[-1] // 4
        return [token for picture in pixels for token in squares(picture, side)]
    for views in pixels:
        crops = torch.cat(list(views[1:]), -1)
        whole, joined = (squares(picture, 8 if family == "phi3_v" else 4) for picture in (views[0], crops))
        found += [*joined, *whole] if family == "phi3_v" else [*whole, *joined]
    return found


def firsts(family: str, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Columns of each row's tokens that repeat no earlier one of their image."""
    tokens, kept = iter(tokens_of(family, inputs)), []
    for images in vision_columns(build_once(family), inputs["input_ids"]):
        kept.append([])
        for columns in images:
            known = set()
            for column in columns:
                pixels = next(tokens)
                kept[-1] += [] if pixels in known else [column]
                known.add(pixels)
    assert next(tokens, None) is None
    return kept


@pytest.mark.parametrize("family", TOLD)
def test_a_token_is_new_if_no_earlier_one_has_its_pixels(family):
    inputs = few_kinds(family, "left_padded")
    prompt, wanted = see(build_once(family), inputs), firsts(family, inputs)
    scores = Dedup().scores(prompt).masked_fill(~prompt.tokens.prunable, 0)
    assert [(row > 0).nonzero()[:, 0].tolist() for row in scores] == wanted
    assert 0 < sum(map(len, wanted)) < int(prompt.tokens.prunable.sum())
    assert (scores[prompt.tokens.prunable].abs() > 0).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_its_own_budget_drops_repeats_alone_and_a_smaller_one_spreads_what_is_left(family, plain, model):
    inputs = few_kinds(family, "one_image_each")
    wanted, kept = firsts(family, inputs), []
    for vision in (VisionPruning(method="dedup"), uniform(0.125, method="dedup"), uniform(0.9, method="dedup")):
        with torch.no_grad(), asymvlm.patch(model, vision=vision) as handle:
            model(**inputs)
        vision_tokens = [set(images[0]) for images in vision_columns(plain, inputs["input_ids"])]
        index = handle.last.index.tolist()
        kept.append([sorted(set(row) & mine) for row, mine in zip(index, vision_tokens)])
    assert kept[0] == wanted
    for row, (few, many) in enumerate(zip(kept[1], kept[2])):
        assert len(few) == 2
        assert len(many) == 14
        assert set(few) <= set(wanted[row]) <= set(many)
        assert few[0] == wanted[row][0]
        assert len(wanted[row]) < 3 or few[1] != wanted[row][1], "spread over the image, not its top"


def test_pictures_that_cannot_be_cut_are_refused():
    told = "internvl adapter does not say which pixels a vision token is made from"
    with pytest.raises(NotImplementedError, match=told):
        asymvlm.prune_inputs(build_once("internvl"), VisionPruning(method="dedup"), **make_batch("internvl", "single"))
    video = make_video("qwen2_vl", with_image=True)
    with pytest.raises(NotImplementedError, match="need one kind of pictures in a call"):
        asymvlm.prune_inputs(build_once("qwen2_vl"), VisionPruning(method="dedup"), **video)
    video = make_video("llava_next_video")
    with pytest.raises(NotImplementedError, match="pixels by vision token of llava_next_video need 'pixel_values'"):
        asymvlm.prune_inputs(build_once("llava_next_video"), VisionPruning(method="dedup"), **video)


def test_a_frame_that_repeats_goes():
    video = make_video("qwen2_5_vl")
    frame = video["pixel_values_videos"][:64]
    video["pixel_values_videos"] = torch.cat([frame, frame])
    found = asymvlm.prune_inputs(build_once("qwen2_5_vl"), VisionPruning(method="dedup"), **video)
    assert found["inputs_embeds"].shape[1] == video["input_ids"].shape[1] - 16
