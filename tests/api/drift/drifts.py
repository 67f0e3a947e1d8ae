"""Drift of transformers, simulated on one tiny model: its classes get subclasses, its hooks are taken away.

What is put on a module's ``__call__`` stands for another caller, before our hooks; what is put on its ``forward`` for
another callee, behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from ways import NATIVE, Drift

from asymvlm.hf import attention
from asymvlm.hf.doors import Door
from asymvlm.models import adapter_for

Kwargs = dict[str, Any]
When = Callable[[Kwargs], bool]


def queries(kwargs: Kwargs) -> int:
    embeds = kwargs.get("inputs_embeds")
    return (kwargs["input_ids"] if embeds is None else embeds).shape[1]


def prefill(kwargs: Kwargs) -> bool:
    return queries(kwargs) > 1


def step(kwargs: Kwargs) -> bool:
    return queries(kwargs) == 1


def always(kwargs: Kwargs) -> bool:
    return True


def decoder(model: PreTrainedModel) -> nn.Module:
    return adapter_for(model).text_of(model)


def top(model: PreTrainedModel) -> nn.Module:
    return model


def replaced(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Give one module a class of its own, whose methods have the signatures of those they replace."""
    base = type(module)
    for name, method in methods.items():
        if name != "__call__" and "__signature__" not in vars(method):
            method.__signature__ = inspect.signature(getattr(base, name))
    module.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, **methods})


def called(where: Callable[..., nn.Module], change: Callable[[Kwargs], Kwargs], when: When = always) -> Drift:
    """The module is called with other arguments."""

    def drift(model: PreTrainedModel) -> None:
        module = where(model)
        base = type(module)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return base.__call__(self, *args, **(change(dict(kwargs)) if when(kwargs) else kwargs))

        replaced(module, __call__=call)

    return drift


def times(number: int, when: When) -> Drift:
    """The decoder is called twice, or without its hooks, which is as good as never."""

    def drift(model: PreTrainedModel) -> None:
        module = decoder(model)
        base = type(module)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if when(kwargs) and number == 0:
                return self.forward(*args, **kwargs)
            if when(kwargs):
                base.__call__(self, *args, **kwargs)
            return base.__call__(self, *args, **kwargs)

        replaced(module, __call__=call)

    return drift


def renamed(old: str, new: str, still_named: bool = False) -> Drift:
    """The decoder calls an argument ``new``; ``old`` vanishes in ``**kwargs``, or is a name of the past."""

    def drift(model: PreTrainedModel) -> None:
        module = decoder(model)
        base = type(module)
        signature = inspect.signature(base.forward)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            outdated, value = kwargs.pop(old, None), kwargs.pop(new, None)
            return base.forward(self, *args, **kwargs, **{old: outdated if value is None and still_named else value})

        parameters = []
        for parameter in signature.parameters.values():
            names = [parameter.name] if parameter.name != old else [new, old] if still_named else [new]
            parameters += [parameter.replace(name=name) for name in names]
        forward.__signature__ = signature.replace(parameters=parameters)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return base.__call__(self, *args, **{new if name == old else name: kwargs[name] for name in kwargs})

        replaced(module, forward=forward, __call__=call)

    return drift


def prepared(change: Callable[[PreTrainedModel, Kwargs], Kwargs]) -> Drift:
    """`generate` hands the model other arguments; the model takes what it now calls ``kv_store`` as its cache."""

    def drift(model: PreTrainedModel) -> None:
        base = type(model)

        def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
            return change(self, base.prepare_inputs_for_generation(self, *args, **kwargs))

        def forward(self: Any, *args: Any, kv_store: Any = None, places: Any = None, **kwargs: Any) -> Any:
            return base.forward(self, *args, **kwargs, **({} if kv_store is None else {NATIVE: kv_store}))

        replaced(model, prepare_inputs_for_generation=prepare, forward=forward)

    return drift


def returned(change: Callable[[Any, Kwargs], Any]) -> Drift:
    """The model returns something else."""

    def drift(model: PreTrainedModel) -> None:
        base = type(model)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return change(base.forward(self, *args, **kwargs), kwargs)

        replaced(model, forward=forward)

    return drift


def unhooked(where: Callable[..., nn.Module], before: bool) -> Drift:
    """One hook of ours is never called."""

    def drift(model: PreTrainedModel) -> None:
        module = where(model)
        hooks = module._forward_pre_hooks if before else module._forward_hooks
        ours = [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Door)]
        assert ours
        for key in ours:
            del hooks[key]

    return drift


def unhooked_in_steps(where: Callable[..., nn.Module], before: bool) -> Drift:
    """As `unhooked`, from the first decode step on."""

    def drift(model: PreTrainedModel) -> None:
        base, gone = type(model), []

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if step(kwargs) and not gone:
                gone.append(unhooked(where, before)(model))
            return base.__call__(self, *args, **kwargs)

        replaced(model, __call__=call)

    return drift


def unscored(model: PreTrainedModel) -> None:
    """Scored layers attend by a function that they do not look up in their configuration."""
    for module in model.modules():
        if attention.BEFORE in module.__dict__:
            module.config = module.__dict__[attention.BEFORE]


def without(*names: str) -> Callable[[Kwargs], Kwargs]:
    return lambda kwargs: {name: value for name, value in kwargs.items() if name not in names}


def moved(kwargs: Kwargs) -> Kwargs:
    positions = kwargs.get("position_ids")
    return kwargs if positions is None else {**kwargs, "position_ids": positions + 1}


def packed(kwargs: Kwargs) -> Kwargs:
    """Positions counted by the columns of the cache."""
    cache, positions = kwargs.get(NATIVE), kwargs.get("position_ids")
    if positions is None:
        return kwargs
    counted = torch.arange(positions.shape[-1]) + (0 if cache is None else int(cache.get_seq_length()))
    return {**kwargs, "position_ids": counted.expand_as(positions).contiguous()}


def tail_moved(kwargs: Kwargs) -> Kwargs:
    """The last three tokens of a step stand one further on."""
    if kwargs.get("position_ids") is None:
        return kwargs
    positions = kwargs["position_ids"].clone()
    positions[..., -3:] += 1
    return {**kwargs, "position_ids": positions}


def part(columns: slice, names: tuple[str, ...] = ("position_ids",)) -> Callable[[Kwargs], Kwargs]:
    """Some of the tokens of a step."""

    def change(kwargs: Kwargs) -> Kwargs:
        cut = [*names, "input_ids", "token_type_ids", "mm_token_type_ids"]
        return kwargs | {name: kwargs[name][..., columns] for name in cut if kwargs.get(name) is not None}

    return change


def second_half_first(model: PreTrainedModel) -> None:
    """A prefill in two calls, the wrong way round."""
    base = type(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if step(kwargs):
            return base.__call__(self, *args, **kwargs)
        half = queries(kwargs) // 2
        base.__call__(self, *args, **part(slice(half, None))(kwargs))
        return base.__call__(self, *args, **part(slice(0, half))(kwargs))

    replaced(model, __call__=call)


def resized(columns: int) -> Callable[[Any, Kwargs], Any]:
    """After prefill the cache holds some columns more or less."""

    def change(output: Any, kwargs: Kwargs) -> Any:
        for layer in output[NATIVE].layers if prefill(kwargs) else ():
            if getattr(layer, "keys", None) is None:
                continue
            for name in ("keys", "values"):
                held = getattr(layer, name)
                more = torch.cat([held, held[:, :, -columns:]], 2) if columns > 0 else held[:, :, :columns]
                setattr(layer, name, more)
        return output

    return change


def another_cache(model: PreTrainedModel) -> Callable[[Kwargs], Kwargs]:
    return lambda kwargs: {**kwargs, NATIVE: DynamicCache(config=model.config.get_text_config())}


def swapped(where: Callable[..., nn.Module], when: When) -> Drift:
    """An empty cache takes the place of the call's."""
    return lambda model: called(where, another_cache(model), when)(model)
