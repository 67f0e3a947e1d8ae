"""The shorter prompt must be all the decoder ever sees, and the vision tower must run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from checks import GENERATED, GREEDY, attention_layers, uniform
from masked_reference import select
from tiny import FAMILIES, make_batch, text_layers
from transformers import PreTrainedModel

import asymvlm


@contextmanager
def watch(family: str, model: PreTrainedModel) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Query lengths of every call of each decoder layer, and a list that grows with each run of the vision tower."""
    lengths: list[list[int]] = [[] for _ in text_layers(model)]
    tower: list[int] = []

    def record(seen: list[int]):
        return lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    hooks = [
        layer.register_forward_pre_hook(record(seen), with_kwargs=True)
        for layer, seen in zip(text_layers(model), lengths, strict=True)
    ]
    hooks.append(model.get_submodule(FAMILIES[family].tower).register_forward_pre_hook(lambda *_: tower.append(1)))
    try:
        yield lengths, tower
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.every_family
@pytest.mark.parametrize("batch", GENERATED)
def test_forward_runs_the_tower_once_and_the_decoder_on_kept_tokens(family, plain, model, batch):
    inputs = make_batch(family, batch)
    kept = select(plain, inputs, 0.5).index.shape[1]
    assert kept < inputs["input_ids"].shape[1]
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)), watch(family, model) as (lengths, tower):
        out = model(**inputs, use_cache=True)
    assert lengths == [[kept]] * len(lengths)
    assert len(tower) == 1
    assert out.logits.shape[1] == kept
    assert {layer.keys.shape[2] for layer in attention_layers(out.past_key_values)} == {kept}
    assert {layer.values.shape[2] for layer in attention_layers(out.past_key_values)} == {kept}


@pytest.mark.every_family
@pytest.mark.parametrize("batch", GENERATED)
def test_generate_prefills_kept_tokens_once_then_single_tokens(family, plain, model, batch):
    inputs = make_batch(family, batch)
    kept = select(plain, inputs, 0.5).index.shape[1]
    with asymvlm.patch(model, vision=uniform(0.5)), watch(family, model) as (lengths, tower):
        out = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    assert lengths == [[kept, 1, 1, 1, 1]] * len(lengths)
    assert len(tower) == 1
    assert {layer.keys.shape[2] for layer in attention_layers(out.past_key_values)} == {kept + 4}


def test_generate_without_a_cache_runs_the_tower_once(family, model):
    with asymvlm.patch(model, vision=uniform(0.5)), watch(family, model) as (_, tower):
        model.generate(**make_batch(family, "single"), do_sample=False, max_new_tokens=4, use_cache=False)
    assert len(tower) == 1


@pytest.mark.parametrize("batch,grouped", [("single", False), ("left_padded", True), ("two_images", True)])
def test_one_image_a_row_takes_the_path_of_two_launches(family, model, monkeypatch, batch, grouped):
    seen, original = [], asymvlm.prompt.choosing.prune_sequence

    def spy(*args, **kwargs):
        seen.append(kwargs["groups"] is not None)
        return original(*args, **kwargs)

    monkeypatch.setattr(asymvlm.prompt.choosing, "prune_sequence", spy)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        model(**make_batch(family, batch))
    assert seen == [grouped]
