"""No mechanism of the patch fails in silence: a call of a model whose transformers drifted raises.

Text eviction alone leaves positions to transformers, so drift in them spoils the unpatched answer as well: not here.
Out of reach are a decoder that replaces the mask it is handed, a caller who hands a loop's step another cache, and a
plain forward that calls no hook of the model at all, which answers as the unpatched model does.
"""

from __future__ import annotations

import copy

import drifts
import pytest
import tiny
from checks import uniform
from drifts import always, called, decoder, prefill, prepared, renamed, returned, step, swapped, times, top, unhooked
from transformers.modeling_outputs import BaseModelOutputWithPast
from ways import FAMILIES, NATIVE, Drift, assert_right, drifted

import asymvlm
from asymvlm.hf.errors import MechanismError

GENERATED, ALL = "generate turn evict_pruned", "generate forward loop turn evict_pruned"
LATER = "generate loop turn evict_pruned"  # ways that have a decode step
EVICTED = "evict evict_static evict_pruned"
ANY = f"{ALL} evict evict_static"
OURS = (MechanismError, ValueError)  # a ValueError of ours names the columns that a mask lacks

# name -> (drift, the ways that it has to stop)
NAMES: dict[str, tuple[Drift, str]] = {
    "generate hands the cache as kv_store": (
        prepared(lambda _, kwargs: {"kv_store" if name == NATIVE else name: kwargs[name] for name in kwargs}),
        f"{GENERATED} evict evict_static",
    ),
    "generate hands the positions as places": (
        prepared(lambda _, kwargs: {"places" if name == "position_ids" else name: kwargs[name] for name in kwargs}),
        GENERATED,
    ),
    "generate hands no mask": (
        prepared(lambda _, kwargs: drifts.without("attention_mask")(kwargs)),
        f"{GENERATED} evict evict_static",
    ),
    "decoder calls its mask mask": (renamed("attention_mask", "mask"), ALL),
    "decoder calls its mask mask and takes both": (renamed("attention_mask", "mask", True), ALL),
    "decoder calls its positions places": (renamed("position_ids", "places"), ALL),
    "decoder calls its positions places and takes both": (renamed("position_ids", "places", True), ALL),
    "decoder calls its embeddings embeds": (renamed("inputs_embeds", "embeds"), ALL),
    "decoder calls its cache kv_store": (renamed(NATIVE, "kv_store"), ANY),
    "decoder calls its cache kv_store and takes both": (renamed(NATIVE, "kv_store", True), f"{LATER} evict"),
    "composite hands no positions": (called(decoder, drifts.without("position_ids")), ALL),
    "composite hands None for positions": (called(decoder, lambda kwargs: {**kwargs, "position_ids": None}), ALL),
    "composite hands no mask": (called(decoder, drifts.without("attention_mask")), ANY),
    "composite hands no cache": (called(decoder, drifts.without(NATIVE), step), f"{LATER} evict evict_static"),
}
STEPS: dict[str, tuple[Drift, str]] = {
    "decoder called twice in the prefill": (times(2, prefill), ANY),
    "decoder called twice in a step": (times(2, step), f"{LATER} evict evict_static"),
    "decoder called without its hooks in the prefill": (times(0, prefill), ANY),
    "decoder called without its hooks in a step": (times(0, step), f"{LATER} evict evict_static"),
    "positions of a step moved by one": (called(decoder, drifts.moved, step), LATER),
    "positions of the prefill moved by one": (called(decoder, drifts.moved, prefill), ALL),
    "positions of a step counted by columns": (called(decoder, drifts.packed, step), LATER),
    "positions of the prefill counted by columns": (called(decoder, drifts.packed, prefill), ALL),
    "positions of a part of the prefill moved": (called(decoder, drifts.tail_moved, prefill), ALL),
    "first token of the prompt not fed": (called(top, drifts.part(slice(1, None)), prefill), GENERATED),
    "last token of the prompt not fed": (called(top, drifts.part(slice(0, -1)), prefill), GENERATED),
    "second half of the prompt fed first": (drifts.second_half_first, GENERATED),
    "generate embeds the ids itself": (
        prepared(lambda model, kwargs: {
            **kwargs, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(kwargs["input_ids"])
        }), GENERATED,
    ),
}  # fmt: skip
CACHES: dict[str, tuple[Drift, str]] = {
    "cache holds a column more after prefill": (returned(drifts.resized(1)), "generate forward loop turn"),
    "cache holds a column less after prefill": (returned(drifts.resized(-1)), "generate forward loop turn"),
    "cache swapped by the composite in a step": (swapped(decoder, step), f"{LATER} evict evict_static"),
    "cache swapped by the composite in the prefill": (swapped(decoder, prefill), "turn evict evict_static"),
    "cache swapped by generate in a step": (swapped(top, step), f"{GENERATED} evict evict_static"),
    "output without a cache": (
        returned(lambda output, _: type(output)(**{name: output[name] for name in output if name != NATIVE})),
        "forward loop",
    ),
}
HOOKS: dict[str, tuple[Drift, str]] = {
    "no hook before the model": (unhooked(top, before=True), ALL),
    "no hook behind the model": (unhooked(top, before=False), LATER),
    "no hook before the decoder": (unhooked(decoder, before=True), ANY),
    "no hook behind the decoder": (unhooked(decoder, before=False), EVICTED),
    "no hook before the model in steps": (drifts.unhooked_in_steps(top, before=True), "loop"),
    "no hook behind the model in steps": (drifts.unhooked_in_steps(top, before=False), GENERATED),
    "no hook before the decoder in steps": (
        drifts.unhooked_in_steps(decoder, before=True), f"{LATER} evict evict_static"
    ),
    "no hook behind the decoder in steps": (drifts.unhooked_in_steps(decoder, before=False), EVICTED),
    "scored layers look up no attention function": (drifts.unscored, EVICTED),
}  # fmt: skip


def cases(table: dict[str, tuple[Drift, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("drift, ways", table.values(), ids=table)


@pytest.mark.parametrize("family", FAMILIES)
@cases(NAMES | STEPS | CACHES)
def test_a_drift_of_the_model_is_an_error(family, drift, ways):
    for way in ways.split() if family == "llava" else ways.split()[:2]:
        with pytest.raises(OURS):
            print(way, drifted(family, way, before=drift))


@pytest.mark.parametrize("family", FAMILIES)
@cases(HOOKS)
def test_a_hook_that_is_not_called_is_an_error(family, drift, ways):
    for way in ways.split() if family == "llava" else ways.split()[:2]:
        with pytest.raises(MechanismError):
            print(way, drifted(family, way, after=drift))


def test_a_copy_of_the_cache_in_the_output_is_known_too():
    def copied(output, kwargs):
        output[NATIVE] = copy.copy(output[NATIVE])
        return output

    for way in ("generate", "loop", "turn"):
        assert_right("llava", way, drifted("llava", way, before=returned(copied)))


def test_a_cache_under_another_field_of_the_output_is_found():
    def other(output, kwargs):
        fields = {"kv_store" if name == NATIVE else name: value for name, value in output.items()}
        return Other(fields)

    class Other(dict):
        __getattr__ = dict.get

    assert_right("llava", "forward", drifted("llava", "forward", before=returned(other)))


@pytest.mark.parametrize("way", ["generate", "turn", "evict"])
def test_a_tuple_for_an_output_is_an_error(way):
    with pytest.raises(AttributeError, match="tuple"):
        print(drifted("llava", way, before=returned(lambda output, _: output.to_tuple())))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_recorder_called_never_or_twice_is_an_error(calls):
    def drift(model):
        module, base = decoder(model), type(decoder(model))

        def call(self, *args, **kwargs):
            kept = [base.__call__(self, *args, **kwargs) for _ in range(calls)]
            return kept[0] if kept else BaseModelOutputWithPast(last_hidden_state=kwargs["inputs_embeds"])

        drifts.replaced(module, __call__=call)

    for way in ("generate", "forward"):
        with pytest.raises(MechanismError, match=f"called its decoder .* {calls} times"):
            print(drifted("llava", way, before=drift))


@pytest.mark.parametrize("name", ["deepstack_visual_embeds", "visual_pos_masks"])
def test_deepstack_under_another_name_is_an_error(name):
    for way in ("generate", "forward", "loop"):
        for both in (False, True):
            with pytest.raises((MechanismError, KeyError)):
                print(drifted("qwen3_vl", way, before=renamed(name, "renamed", both)))


@pytest.mark.parametrize("loss", ["mask", "kind"])
def test_windows_that_would_be_lost_are_an_error(loss):
    """Gemma 3 with windows that the answers leave, and no padding that would tell of the mask."""

    def lost(kwargs):
        masks = kwargs.pop("attention_mask", None)
        if loss == "mask":
            return {**kwargs, "mask": masks}
        return {**kwargs, "attention_mask": {"local": masks["sliding_attention"], "full_attention": None}}

    model = tiny.build("gemma3", sliding_window=12)
    inputs = tiny.make_batch("gemma3", "single")
    del inputs["attention_mask"]
    called(decoder, lost, lambda kwargs: isinstance(kwargs.get("attention_mask"), dict))(model)
    with asymvlm.patch(model, vision=uniform(0.5)), pytest.raises(MechanismError, match=r"windows|decoder without"):
        print(model(**inputs))


def test_harness_finds_the_right_answers_where_nothing_drifts():
    for way in ANY.split():
        assert_right("llava", way, drifted("llava", way, before=called(decoder, dict, always)))
