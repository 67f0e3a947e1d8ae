"""Attention of chosen tokens to what they see, by all heads or each, against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from asymvlm.hf.attention import Places, score_rows


@pytest.mark.parametrize("width, softcap, window", [(16, 0.0, None), (16, 5.0, 6), (264, 5.0, None), (264, 0.0, 6)])
def test_it_is_the_mean_over_the_rows_of_the_whole_matrix(width, softcap, window):
    draw = torch.Generator().manual_seed(width)
    query, key = (torch.randn(2, heads, 11, width, generator=draw) for heads in (4, 2))
    columns = torch.tensor([[-2, 1, 2, 3, 5, 6, 9, 10, 12, 13, 14], [0, 1, 2, 3, 4, 5, 6, -2, 8, 9, 10]])
    chosen = torch.tensor([[10, 4, -1], [3, 9, 10]])
    standing = columns.gather(1, chosen.clamp_min(0)).masked_fill(chosen < 0, -1)
    logits = query @ key.repeat_interleave(2, 1).mT * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    back = columns[:, :, None] - columns[:, None]
    seen = (back >= 0) & (back < (window or 100)) & (columns >= 0)[:, None]
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    for row, places in enumerate(chosen.tolist()):
        wanted = weights[row][:, [place for place in places if place >= 0]].mean(1)
        for per_head in (False, True):
            lying = Places(columns.int(), standing[:, 0], queries=chosen, query_pos=standing, per_head=per_head)
            found = score_rows(query, key, lying, 0.3, softcap, window)[row]
            torch.testing.assert_close(found, wanted if per_head else wanted.mean(0), rtol=0, atol=1e-6)
