"""Compact positions must be what they say: survivors renumbered from 0, decode going on from there."""

from __future__ import annotations

import pytest
import torch
from checks import GENERATED, GREEDY, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_greedy, select
from tiny import FAMILIES, make_batch
from torch import Tensor

import asymvlm


def renumbered(family: str, keep: Tensor) -> Tensor:
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    return positions.expand(3, -1, -1) if FAMILIES[family].mrope else positions


@pytest.mark.parametrize("batch", GENERATED)
def test_compact_generation_is_a_run_with_renumbered_positions(family, plain, model, batch):
    inputs = make_batch(family, batch)
    keep = select(plain, inputs, 0.5).keep
    ids, logits = masked_greedy(plain, inputs, keep, steps=6, position_ids=renumbered(family, keep))
    _, original = masked_greedy(plain, inputs, keep, steps=6)
    with asymvlm.patch(model, vision=uniform(0.5, positions="compact")):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=6)
    assert torch.equal(found.sequences[:, -6:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert (logits - original)[:, 0].abs().max() > 1e-3, "positions must matter"


@pytest.mark.parametrize("batch", [*GENERATED, "right_padded"])
def test_compact_forward_is_a_run_with_renumbered_positions(family, plain, model, batch):
    inputs = make_batch(family, batch)
    selection = select(plain, inputs, 0.5)
    reference = masked_forward(plain, inputs, selection.keep, position_ids=renumbered(family, selection.keep))
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, positions="compact")):
        assert_kept_logits(model(**inputs).logits, reference, selection)


def test_a_loop_on_compact_positions_goes_on_from_the_shorter_end(family, plain, model):
    inputs = make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    _, logits = masked_greedy(plain, inputs, keep, steps=3, position_ids=renumbered(family, keep))
    mask, call, found = inputs["attention_mask"], inputs, []
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, positions="compact")):
        for _ in range(3):
            out = model(**call, use_cache=True)
            found.append(out.logits[:, -1])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            call = {"input_ids": out.logits[:, -1:].argmax(-1), "past_key_values": out.past_key_values}
            call["attention_mask"] = mask
    assert_close(torch.stack(found, 1), logits)


def test_given_positions_are_kept(family, plain, model):
    """A caller's own positions, here with a jump, are gathered with their tokens."""
    inputs = make_batch(family, "single")
    selection = select(plain, inputs, 0.5)
    positions = torch.arange(inputs["input_ids"].shape[1])[None] * 2
    positions = positions.expand(3, -1, -1) if FAMILIES[family].mrope else positions
    reference = masked_forward(plain, inputs, selection.keep, position_ids=positions)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        assert_kept_logits(model(**inputs, position_ids=positions).logits, reference, selection)
