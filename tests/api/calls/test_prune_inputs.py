"""``prune_inputs`` must give an unpatched model the same short problem, and each part of it must matter.

The mutations break one part at a time: a matrix of comparisons that would accept them proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import assert_kept_logits, uniform
from masked_reference import masked_forward, select, take
from model_state import changes, snapshot
from tiny import FAMILIES, IMAGE, make_batch
from torch import Tensor

import asymvlm
from asymvlm.patched import forward
from asymvlm.prompt.deepstack import DeepStack, deepstack_inputs

Inputs = dict[str, Tensor]
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DEEPSTACK], indirect=True)
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_pruned_inputs_run_on_the_unpatched_model(family, plain, batch):
    inputs = make_batch(family, batch)
    given = {name: value.clone() for name, value in inputs.items()}
    selection = select(plain, inputs, 0.5)
    before = snapshot(plain)
    pruned = asymvlm.prune_inputs(plain, vision=uniform(0.5), **inputs)
    assert not changes(before, snapshot(plain))
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[name], given[name]) for name in given)
    assert FAMILIES[family].pixels not in pruned
    assert "input_ids" not in pruned
    with torch.no_grad():
        found = plain(**pruned).logits
    assert_kept_logits(found, masked_forward(plain, inputs, selection.keep), selection)


@pytest.mark.parametrize("family", DEEPSTACK, indirect=True)
def test_features_for_the_decoder_alone_are_refused(family, plain):
    with pytest.raises(NotImplementedError, match="DeepStack"):
        asymvlm.prune_inputs(plain, vision=uniform(0.5), **make_batch(family, "single"))


def compact_positions(pruned: Inputs, is_vision: Tensor) -> None:
    positions = (pruned["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    pruned["position_ids"] = positions.expand_as(pruned["position_ids"]).contiguous()


def no_padding_mask(pruned: Inputs, is_vision: Tensor) -> None:
    pruned["attention_mask"] = torch.ones_like(pruned["attention_mask"])


def two_vision_tokens_swapped(pruned: Inputs, is_vision: Tensor) -> None:
    first, second = is_vision[-1].nonzero()[:2, 0]
    pruned["inputs_embeds"][-1, [first, second]] = pruned["inputs_embeds"][-1, [second, first]]


def neighbouring_tokens_gathered(pruned: Inputs, is_vision: Tensor) -> None:
    pruned["inputs_embeds"][is_vision] = pruned["inputs_embeds"].roll(1, 1)[is_vision]


def no_token_types(pruned: Inputs, is_vision: Tensor) -> None:
    del pruned["token_type_ids"]


def no_mask(pruned: Inputs, is_vision: Tensor) -> None:
    del pruned["attention_mask"]


def rows_of_neighbours(pruned: Inputs, is_vision: Tensor) -> None:
    pruned["per_layer_inputs"] = pruned["per_layer_inputs"].roll(1, 1)


MUTATIONS: list[tuple[Callable[[Inputs, Tensor], None], str, tuple[str, ...]]] = [
    (compact_positions, "single", ("llava", "gemma3", "qwen2_5_vl", "paligemma", "phi4_multimodal")),
    (compact_positions, "left_padded", ("llava", "gemma3", "qwen2_5_vl")),
    (no_padding_mask, "left_padded", ("llava", "gemma3", "qwen2_5_vl")),
    (two_vision_tokens_swapped, "single", ("llava", "gemma3", "qwen2_5_vl")),
    (neighbouring_tokens_gathered, "two_images", ("llava", "gemma3", "qwen2_5_vl")),
    (no_token_types, "single", ("gemma3",)),
    (rows_of_neighbours, "single", ("gemma4",)),
    # gapped positions without a mask and a cache are read as packed sequences; Qwen packs by another row of positions
    (no_mask, "single", ("llava",)),
]


@pytest.mark.parametrize(
    "family, mutate, batch",
    [(name, mutate, batch) for mutate, batch, families in MUTATIONS for name in families],
    indirect=["family"],
)
def test_a_broken_part_shows(family, plain, mutate, batch):
    inputs = make_batch(family, batch)
    selection = select(plain, inputs, 0.5)
    expected = take(masked_forward(plain, inputs, selection.keep), selection.index)
    is_real = selection.index >= 0
    pruned = asymvlm.prune_inputs(plain, vision=uniform(0.5), **inputs)
    mutate(pruned, take(inputs["input_ids"], selection.index) == IMAGE)
    with torch.no_grad():
        found = plain(**pruned, use_cache=False).logits
    assert (found - expected)[is_real].abs().max() > 1e-3


def rolled(stack: DeepStack, past: int, queries: int, batch: int) -> dict[str, object]:
    return deepstack_inputs(DeepStack(stack.place, [rows.roll(1, 0) for rows in stack.rows]), past, queries, batch)


def left_out(*_: object) -> dict[str, object]:
    return {}


@pytest.mark.parametrize("family", DEEPSTACK, indirect=True)
@pytest.mark.parametrize("broken", [rolled, left_out])
def test_broken_deepstack_shows(family, plain, model, monkeypatch, broken):
    inputs = make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    expected = take(masked_forward(plain, inputs, selection.keep), selection.index)
    monkeypatch.setattr(forward, "deepstack_inputs", broken)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        found = model(**inputs).logits
    assert (found - expected)[selection.index >= 0].abs().max() > 1e-3
