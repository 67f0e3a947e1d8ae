"""Whoever reads the last columns of a pruned call reads the caller's last columns, whatever the layout of the batch."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, uniform
from masked_reference import masked_forward, select
from tiny import FAMILIES, PAD, make_batch
from torch import Tensor, nn

import asymvlm

COMPLETION = 6


def with_completions(
    family: str, batch: str, lengths: tuple[int, ...], *, gap: int = 0, left: int = 0
) -> dict[str, Tensor]:
    """Completions behind the prompts of a batch, padded on the right; ``gap`` columns of padding in front of them and
    ``left`` in front of all."""
    inputs = make_batch(family, batch)
    ids, columns = inputs["input_ids"], inputs["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 90, (len(ids), COMPLETION), generator=generator)
    real = torch.arange(COMPLETION) < torch.tensor(lengths)[:, None]
    spare = torch.full((len(ids), gap), PAD)
    wider = {
        "input_ids": torch.cat([ids, spare, tokens.where(real, PAD)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros_like(spare), real.long()], 1),
    }
    for name, value in inputs.items():
        if name not in wider and value.shape[:2] == (len(ids), columns):
            wider[name] = nn.functional.pad(value, (0, gap + COMPLETION), value=FAMILIES[family].generated.get(name, 0))
    wider = {
        name: nn.functional.pad(value, (left, 0), value=PAD if name == "input_ids" else 0)
        for name, value in wider.items()
    }
    return {**inputs, **wider}


LAYOUTS = {
    "prompts padded left": dict(batch="one_image_each", lengths=(2, 6, 3)),
    "equal prompts": dict(batch="single", lengths=(4,)),
    "prompts padded right": dict(batch="right_padded", lengths=(6, 2, 4)),
    "padding between": dict(batch="left_padded", lengths=(6, 2, 4), gap=2),
    "all padded left": dict(batch="single", lengths=(4,), left=3),
    "a row without an image": dict(batch="image_free_row", lengths=(1, 6, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_of_completions_stay_at_the_end(family, plain, model, layout):
    inputs = with_completions(family, **layout)
    positions = {}
    if not FAMILIES[family].mrope:  # so that padding between does not move the completions
        positions["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        positions["position_ids"] += FAMILIES[family].first_position
    selection = select(plain, inputs, 0.5)
    reference = masked_forward(plain, inputs, selection.keep, **positions)[:, -COMPLETION - 1 :]
    scored = inputs["attention_mask"][:, -COMPLETION - 1 :].bool()
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        sliced = model(**inputs, **positions, use_cache=False).logits[:, -COMPLETION - 1 :]
        asked_for = model(**inputs, **positions, use_cache=False, logits_to_keep=COMPLETION + 1).logits
        assert torch.equal(handle.last.index, selection.index)
        assert handle.last.tokens_after == selection.keep.sum(1).tolist()
    assert_close(sliced[scored], reference[scored])
    assert_close(asked_for[scored], reference[scored])
    with torch.no_grad():
        unpruned = plain(**inputs, **positions).logits[:, -COMPLETION - 1 :]
    assert (unpruned - reference)[scored].abs().max() > 1e-3, "pruning must matter"


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
def test_last_columns_that_reach_an_image_are_refused(family, model):
    inputs = make_batch(family, "left_padded")
    behind = int((inputs["input_ids"] == FAMILIES[family].image[-1]).any(0).flip(0).long().argmax())
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        model(**inputs, logits_to_keep=behind)
        with pytest.raises(ValueError, match=f"logits_to_keep={behind + 5} reaches .* the last {behind} columns"):
            model(**inputs, logits_to_keep=behind + 5)
        with pytest.raises(ValueError, match="must be 0 or more last columns, got -3"):
            model(**inputs, logits_to_keep=-3)
        with pytest.raises(NotImplementedError, match="must be a number of last columns"):
            model(**inputs, logits_to_keep=torch.tensor([1]))
    with pytest.raises(ValueError, match="logits_to_keep"):
        asymvlm.prune_inputs(model, uniform(0.5), **inputs, logits_to_keep=behind + 5)
    with pytest.raises(NotImplementedError, match="must be a number of last columns"):
        asymvlm.prune_inputs(model, uniform(0.5), **inputs, logits_to_keep=torch.tensor([1]))
