"""The image path of Phi-3.5-Vision against a literal reading of its description."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from phi3_v_tiny import CROP, LONGER, SIDE, make_inputs, picture, separators, tiny_model
from PIL import Image

from asymvlm.app.loading import visible_region
from asymvlm.models.phi3_v import Phi3VImageProcessor

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def crops_of(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """Rows and columns: as many crops along the long side as fit, the short side rounded up to whole crops."""
    long, short = max(width, height), min(width, height)
    fits = [s for s in range(1, num_crops + 1) if s * math.ceil(s * short / long - 1e-9) <= num_crops]
    along, across = max(fits), math.ceil(int(max(fits) * 336 / (long / short)) / 336)
    return (across, along) if width >= height else (along, across)


SIZES = [(336, 336), (500, 300), (300, 500), (640, 480), (1920, 1080), (1000, 90), (90, 1000), (41, 37), (2000, 120)]


@pytest.mark.parametrize("num_crops", [1, 4, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_token_count_and_crops(size, num_crops):
    """(hw + 1) * 144 + 1 + (h + 1) * 12 tokens, separators included."""
    h, w = crops_of(*size, num_crops)
    processor = Phi3VImageProcessor(num_crops=num_crops)
    assert h * w <= num_crops
    assert processor.canvas(picture(*size)).size == (336 * w, 336 * h)
    tokens = (h * w + 1) * 144 + 1 + (h + 1) * 12
    assert processor.calc_num_image_tokens_from_image_size(*size) == tokens == len(separators(h, w, side=12))


def test_the_published_maximum():
    """A square page in 4 x 4 crops gives 2509 tokens, in 2 x 2 crops 757."""
    page = picture(100, 100)
    assert Phi3VImageProcessor(num_crops=16)(page)["num_img_tokens"] == [2509]
    assert Phi3VImageProcessor(num_crops=4)(page)["num_img_tokens"] == [757]


def cubic(distance: float) -> float:
    """The cubic convolution kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def shrink(lines: np.ndarray, size: int) -> np.ndarray:
    """The first axis resampled to ``size`` without antialiasing, edges repeated, pixel centres half way."""
    scale = len(lines) / size
    out = np.zeros((size, *lines.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            out[i] += cubic(centre - j) * lines[min(max(j, 0), len(lines) - 1)]
    return out


@pytest.mark.parametrize("size", [(90, 47), (47, 90), (60, 60), (200, 20)], ids=str)
def test_views(size):
    """Resized along the long side, centred on white, normalized; crops row by row behind a bicubic global view."""
    crop, num_crops = 28, 4
    image, (width, height) = picture(*size), size
    h, w = crops_of(width, height, num_crops)
    along = max(h, w) * crop
    if width >= height:
        resized = np.asarray(image.resize((along, int(along / (width / height))), Image.Resampling.BILINEAR))
    else:
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        resized = np.asarray(turned.resize((along, int(along / (height / width))), Image.Resampling.BILINEAR))
        resized = resized.transpose(1, 0, 2)
    page = np.full((h * crop, w * crop, 3), 255.0)
    top, left = ((page.shape[axis] - resized.shape[axis]) // 2 for axis in (0, 1))
    page[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    page = (page / 255 - MEAN) / STD
    expected = [shrink(shrink(page, crop).transpose(1, 0, 2), crop).transpose(1, 0, 2)]
    expected += [page[r * crop : (r + 1) * crop, c * crop : (c + 1) * crop] for r in range(h) for c in range(w)]
    expected += [np.zeros((crop, crop, 3))] * (num_crops - h * w)

    found = Phi3VImageProcessor(num_crops, crop_pixels=crop, num_img_tokens=1)(image, return_tensors="pt")
    assert found["image_sizes"].tolist() == [[h * crop, w * crop]]
    assert found["pixel_values"].shape == (1, num_crops + 1, 3, crop, crop)
    np.testing.assert_allclose(found["pixel_values"][0].permute(0, 2, 3, 1).numpy(), np.stack(expected), atol=2e-5)


def test_every_kind_of_input_gives_the_same_views():
    image = picture(90, 47)
    processor = Phi3VImageProcessor(crop_pixels=28, num_img_tokens=1)
    expected = processor([image], return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    channels_first = torch.tensor(array).permute(2, 0, 1)
    with_alpha = Image.fromarray(np.dstack([array, np.full(array.shape[:2], 7, np.uint8)]))
    for images in (image, [[image]], array, channels_first, [channels_first / 255], with_alpha):
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], expected)
    assert np.array_equal(processor(image, return_tensors="np")["pixel_values"], expected.numpy())
    assert processor(image, num_crops=1, return_tensors="pt")["pixel_values"].shape[1] == 2


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 9)), Image.new("RGB", (9, 0)), np.zeros((0, 9, 3), np.uint8)])
def test_an_image_without_pixels_is_refused(image):
    with pytest.raises(ValueError, match="image 1 has no pixels"):
        Phi3VImageProcessor()([picture(9, 9), image])


def test_a_very_long_image_keeps_one_line():
    assert Phi3VImageProcessor(num_crops=4).canvas(picture(3000, 1)).size == (4 * 336, 336)


def test_a_heatmap_is_drawn_over_the_padded_picture():
    """The crops' grid covers the padding too; laid over the image alone, every patch would be off."""
    processor = Phi3VImageProcessor()
    assert visible_region(picture(500, 300), processor).size == processor.canvas(picture(500, 300)).size == (672, 672)


def test_num_crops_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Phi3VImageProcessor(num_crops=0)(picture(9, 9))


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (1, 3), (4, 1)], ids=str)
def test_token_order(layout, monkeypatch):
    """Crops as one picture, its rows ended by sub_GN, glb_GN, the global view likewise; a token is four patches."""
    h, w = layout
    images = tiny_model().model.vision_embed_tokens
    side, channels = 2 * SIDE, 16  # patches along a crop
    features = torch.randn(1 + h * w, side, side, channels, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(images.img_processor, "forward", lambda pixels: features.flatten(1, 2))
    seen: list[torch.Tensor] = []
    hook = images.img_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images(torch.zeros(1, 5, 3, CROP, CROP), torch.tensor([[h * CROP, w * CROP]]))
    hook.remove()

    def token(crop: int, y: int, x: int) -> torch.Tensor:
        return torch.cat([features[crop, 2 * y + dy, 2 * x + dx] for dy in (0, 1) for dx in (0, 1)])

    expected = []
    for y in range(h * SIDE):
        for x in range(w * SIDE):
            crop = 1 + (y // SIDE) * w + x // SIDE
            expected.append(token(crop, y % SIDE, x % SIDE))
        expected.append(images.sub_GN.flatten())
    expected.append(images.glb_GN.flatten())
    for y in range(SIDE):
        expected += [token(0, y, x) for x in range(SIDE)] + [images.sub_GN.flatten()]
    assert torch.equal(seen[0], torch.stack(expected))


def test_features_are_the_last_layer_but_ones_and_unused_crops_do_not_matter():
    images = tiny_model().model.vision_embed_tokens
    inputs = make_inputs((LONGER,))
    views = inputs["pixel_values"][0, :4]
    tower = copy.deepcopy(images.img_processor.vision_model)
    with torch.no_grad():
        expected = tower(views, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(images.img_processor(views), expected)
        expected = images(inputs["pixel_values"], inputs["image_sizes"])
        inputs["pixel_values"][0, 4:] = torch.nan
        assert torch.equal(images(inputs["pixel_values"], inputs["image_sizes"]), expected)


def test_the_projection_is_two_layers_with_an_exact_gelu():
    images = tiny_model().model.vision_embed_tokens
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    first, last = images.img_projection[0], images.img_projection[2]
    inner = x @ first.weight.T + first.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(images.img_projection(x), gelu @ last.weight.T + last.bias)
