"""A transformers that does otherwise than the patch rests on: every call raises or is right, none answers wrongly.

Each drift is put on a patched tiny model; the answers without it are those that the other test modules prove.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drift_ways import BOTH, FAMILIES, FOREIGN, NATIVE, WAYS, Answer, differs, fresh, right
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import asymvlm
from asymvlm.hf import arguments
from asymvlm.hf.errors import MechanismError
from asymvlm.models import adapter_for

PRUNING = ("generate", "forward", "loop", "turn", "beams", "static", "lookup", "sample")
EVICTING = ("evict", "evict_pruned")
ERRORS = (MechanismError, RuntimeError, ValueError, NotImplementedError, TypeError)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    return adapter_for(model).text_of(model)


def around(module: nn.Module, change: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
    """Let ``change`` stand in for the module's own forward, behind all hooks."""
    original = module.forward
    module.forward = functools.wraps(original)(lambda *args, **kwargs: change(original, kwargs))


def without_hook(model: PreTrainedModel, which: str) -> None:
    handle = model.__dict__["_asymvlm_handle"]
    door = handle._forwards.model if "model" in which else handle._forwards.decoder
    door._hooks[0 if "before" in which else 1].remove()


def shifted(model: PreTrainedModel) -> None:
    """`generate` and composites hand on positions one too far."""
    decoder_of(model).register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args, {**kwargs, "position_ids": kwargs["position_ids"] + 1})
            if kwargs.get("position_ids") is not None
            else None
        ),
        with_kwargs=True,
        prepend=True,
    )


def counted_from_the_cache(model: PreTrainedModel) -> None:
    """Single tokens stand where the shortened sequence ends."""

    def place(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        positions, cache = kwargs.get("position_ids"), kwargs.get(NATIVE)
        if positions is None or positions.shape[-1] != 1 or cache is None:
            return None
        return args, {**kwargs, "position_ids": torch.full_like(positions, int(cache.get_seq_length()))}

    decoder_of(model).register_forward_pre_hook(place, with_kwargs=True, prepend=True)


def renamed_in_generate(model: PreTrainedModel) -> None:
    """The cache comes under a name that nobody knows."""

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {("kv_store" if name == NATIVE else name): value for name, value in kwargs.items()}

    model.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)


def without_positions(model: PreTrainedModel) -> None:
    def drop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    decoder_of(model).register_forward_pre_hook(drop, with_kwargs=True, prepend=True)


def called_twice(model: PreTrainedModel) -> None:
    decoder, original = decoder_of(model), type(decoder_of(model)).__call__

    def change(forward: Any, kwargs: dict[str, Any]) -> Any:
        if not getattr(model, "nested", False):
            model.nested = True
            try:
                original(decoder, **kwargs)
            finally:
                model.nested = False
        return forward(**kwargs)

    around(decoder, change)


def never_called(model: PreTrainedModel) -> None:
    """The composite runs the decoder's code without calling the module, so its hooks do not run."""
    decoder_of(model)._forward_pre_hooks.clear()


def a_column_more(model: PreTrainedModel) -> None:
    """Each layer's cache holds one token twice after prefill."""

    def change(forward: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(**kwargs)
        cache = arguments.cache_of(output)
        if cache is not None and isinstance(cache, DynamicCache):
            for layer in cache.layers:
                if getattr(layer, "keys", None) is not None and layer.keys.ndim == 4 and not layer.is_sliding:
                    layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], 2)
                    layer.values = torch.cat([layer.values, layer.values[:, :, -1:]], 2)
        return output

    around(decoder_of(model), change)


DRIFTS: dict[str, tuple[Callable[[PreTrainedModel], None], tuple[str, ...]]] = {
    "positions one too far": (shifted, ("generate", "forward", "loop", "turn", "beams")),
    "positions counted from the cache": (counted_from_the_cache, ("generate", "loop", "turn", "beams")),
    "a foreign name for the cache": (renamed_in_generate, ("generate", "loop", "turn", *EVICTING)),
    "no positions": (without_positions, ("generate", "forward", "loop", "turn", "beams")),
    "the decoder called twice": (called_twice, ("generate", "forward", "loop", "turn")),
    "the decoder's hooks never run": (never_called, ("generate", "forward", "loop", "turn", *EVICTING)),
    "a column more in the cache": (a_column_more, ("generate", "forward", "loop", "beams")),
    "no hook before the model": (lambda m: without_hook(m, "before model"), ("generate", "forward", "turn", "beams")),
    "no hook behind the model": (lambda m: without_hook(m, "behind model"), ("generate", "loop", "turn")),
    "no hook before the decoder": (
        lambda m: without_hook(m, "before decoder"),
        ("generate", "forward", "loop", "turn", *EVICTING),
    ),
    "no hook behind the decoder": (lambda m: without_hook(m, "behind decoder"), EVICTING),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drift", DRIFTS)
def test_no_drift_is_answered_wrongly(family: str, drift: str) -> None:
    put, ways = DRIFTS[drift]
    raised = 0
    for way in ways:
        settings, call = WAYS[way]
        model, expected = fresh(family), right(family, way)
        with asymvlm.patch(model, **settings):
            put(model)
            try:
                found: Answer | None = call(model)
            except ERRORS:
                found, raised = None, raised + 1
        assert found is None or not differs(found, expected), f"{way} answered wrongly"
    assert raised > 0, "a drift that no call notices is no drift"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_with_one_name_of_the_cache_known_each_call_is_right_or_raises(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that knows transformers, as it was before the cache was renamed: only the other name is known."""
    settings, call = WAYS[way]
    expected = right(family, way)
    monkeypatch.setattr(arguments, "CACHE_NAMES", (FOREIGN,))
    model = fresh(family)
    try:
        with asymvlm.patch(model, **settings):
            found = call(model)
    except ERRORS:
        return
    assert not differs(found, expected)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "inputs_embeds"])
def test_a_renamed_argument_of_the_decoder_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old keyword would vanish in ``**kwargs``."""
    model = fresh("gemma3")
    cls = type(decoder_of(model))
    known = inspect.signature(cls.forward)
    monkeypatch.setattr(
        cls.forward,
        "__signature__",
        known.replace(
            parameters=[
                parameter.replace(name=f"new_{name}") if parameter.name == name else parameter
                for parameter in known.parameters.values()
            ]
        ),
        raising=False,
    )
    settings, _ = WAYS["generate"]
    with asymvlm.patch(model, **settings) as handle:
        callee = handle._forwards.decoder.callee
        assert name not in callee.names
        with pytest.raises(MechanismError, match=f"handing on the shortened prompt.*names no argument {name}"):
            callee.write({name: torch.zeros(1)})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", BOTH)
def test_either_keyword_serves_and_ours_warns_of_nothing(
    family: str, key: str, recwarn: pytest.WarningsRecorder
) -> None:
    """`generate`, forwards and loops of a patched model take the cache by both names, on every version."""
    from drift_ways import loop, turn

    for way, call in (("loop", loop), ("turn", turn)):
        model = fresh(family)
        with asymvlm.patch(model, **WAYS[way][0]):
            assert not differs(call(model, key), right(family, way))
    named = [warning for warning in recwarn if issubclass(warning.category, (FutureWarning, DeprecationWarning))]
    assert [str(warning.message) for warning in named if "past_key_values" in str(warning.message)] == []


def test_two_caches_are_one_too_many() -> None:
    model = fresh("llava")
    settings, _ = WAYS["generate"]
    with asymvlm.patch(model, **settings), pytest.raises(ValueError, match="pass one cache, got two"):
        model(input_ids=torch.tensor([[5, 6]]), **{name: DynamicCache() for name in BOTH})


def test_an_output_without_a_cache_is_noticed() -> None:
    model = fresh("llava")
    original = model.forward
    model.forward = functools.wraps(original)(lambda **kwargs: (original(**kwargs).logits,))
    settings, call = WAYS["forward"]
    with asymvlm.patch(model, **settings), pytest.raises(MechanismError, match="came back without a K/V cache"):
        call(model)
