"""A row must not depend on its batch, even where every row keeps another share of its tokens."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, one_tier_each
from masked_reference import select
from tiny import make_batch, single_rows

import asymvlm
from asymvlm import VisionPruning

TIERS = ["conservative", "moderate", "aggressive"]


@pytest.mark.every_family
def test_generated_ids_and_logits(family, plain, model):
    inputs = make_batch(family, "left_padded")
    gaps = select(plain, inputs, 1.0).gap
    budget = one_tier_each(gaps)
    with asymvlm.patch(model, vision=VisionPruning(budget=budget)) as handle:
        whole = model.generate(**inputs, **GREEDY, max_new_tokens=6)
        in_batch = handle.last
        for b, row in enumerate(single_rows(family, "left_padded")):
            alone = model.generate(**row, **GREEDY, max_new_tokens=6)
            assert torch.equal(whole.sequences[b, -6:], alone.sequences[0, -6:])
            assert_close(torch.stack(whole.logits, 1)[b], torch.stack(alone.logits, 1)[0])
            assert handle.last.kept == [in_batch.kept[b]]
            assert handle.last.tier == [in_batch.tier[b]]
    by_gap = sorted(range(3), key=lambda b: gaps[b])
    assert [in_batch.tier[b] for b in by_gap] == TIERS
    assert len({kept / tokens for kept, tokens in zip(in_batch.kept, in_batch.vision_tokens, strict=True)}) == 3


@pytest.mark.every_family
def test_forward_logits(family, plain, model):
    inputs = make_batch(family, "right_padded")
    budget = one_tier_each(select(plain, inputs, 1.0).gap)
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(budget=budget)) as handle:
        whole = model(**inputs).logits
        index = handle.last.index
        for b, row in enumerate(single_rows(family, "right_padded")):
            alone, kept = model(**row).logits[0], index[b] >= 0
            assert torch.equal(handle.last.index[0], index[b, kept])
            assert_close(whole[b, kept], alone)
            padding = int((inputs["attention_mask"][b] == 0).sum())
            assert int(kept.nonzero()[-1]) == len(kept) - padding - 1, "what is behind the last token stays there"
