"""The tokens that each image of a sample is sure to keep, against plain Python."""

from __future__ import annotations

import pytest
import torch
from naive import best, by_image, image_floors

from asymvlm_kernels.prefill.prune.groups import guaranteed_tokens


def check(scores, mask, groups, millionths=None):
    result = guaranteed_tokens(scores, mask, groups, millionths)
    for b in range(len(scores)):
        values = dict(enumerate(scores[b].tolist()))
        images = by_image(mask[b].nonzero()[:, 0].tolist(), groups[b].tolist())
        floors, wanted = image_floors(images), []
        for image, places in images.items():
            share = 0 if millionths is None else max(len(places) * int(millionths[b]) // 1_000_000, 1)
            wanted += best(places, values, max(floors[image], share))
        assert result[b].nonzero()[:, 0].tolist() == sorted(wanted)


@pytest.mark.parametrize("images", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_floors_of_interleaved_images(images, dtype, device):
    torch.manual_seed(images)
    scores = torch.randn(3, 400, device=device).mul(5).round()  # ties
    scores[:, ::17] = float("nan")
    mask = torch.rand(3, 400, device=device) < 0.8
    groups = torch.randint(-2, images - 2, (3, 400), device=device, dtype=dtype)
    check(scores, mask, groups)
    check(scores, mask, groups, torch.tensor([1, 300_000, 1_000_000], device=device))


def test_rows_with_one_image_have_no_floor(device):
    scores = torch.randn(2, 40, device=device)
    groups = torch.zeros(2, 40, dtype=torch.int64, device=device)
    groups[1, 20:] = 5
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    assert guaranteed_tokens(scores, mask, groups).sum(-1).tolist() == [0, 16]
    mask[1, 20:] = False  # its second image holds no prunable token
    assert guaranteed_tokens(scores, mask, groups).sum(-1).tolist() == [0, 0]


def test_an_image_smaller_than_the_floor_keeps_all_it_has(device):
    groups = torch.tensor([[0] * 3 + [1] * 300], device=device)
    scores, mask = torch.randn(1, 303, device=device), torch.ones(1, 303, dtype=torch.bool, device=device)
    result = guaranteed_tokens(scores, mask, groups)[0]
    assert result[:3].all()
    assert int(result[3:].sum()) == 300 // 16


def test_nothing_to_guarantee(device):
    empty = torch.zeros(2, 0, dtype=torch.bool, device=device)
    assert guaranteed_tokens(torch.zeros(2, 0, device=device), empty, empty.long()).shape == (2, 0)
    none = torch.zeros(1, 9, dtype=torch.bool, device=device)
    assert not guaranteed_tokens(torch.randn(1, 9, device=device), none, none.long()).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_images_may_have_the_outermost_numbers(dtype, device):
    info = torch.iinfo(dtype)
    groups = torch.tensor([[info.max] * 400 + [info.min] * 20], dtype=dtype, device=device)
    mask = torch.arange(420, device=device)[None] % 2 > 0
    check(torch.randn(1, 420, device=device), mask, groups)
