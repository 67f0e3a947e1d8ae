"""The arguments of a call of transformers' code, under names that do not change with its version.

A hook sees the names that the caller used. transformers 5.24 calls ``cache`` what was ``past_key_values`` before, and
takes both; so whoever reads one name alone sees nothing in half of the calls. `read` gives the arguments our names, and
`Callee.write` those that the called function has: told by its signature, never by a version number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asymvlm.hf.errors import MechanismError

IDS, EMBEDS, MASK, POSITIONS = "input_ids", "inputs_embeds", "attention_mask", "position_ids"
CACHE, USE_CACHE = "cache", "use_cache"
CACHE_NAMES = (CACHE, "past_key_values", "cache_params")  # newest first
ABOUT_CACHE = (CACHE, USE_CACHE, "cache_position")  # what only a call with a cache needs
PROMPT = (IDS, EMBEDS, MASK, POSITIONS)  # what a shortened prompt cannot do without


@dataclass(frozen=True)
class Callee:
    """A function of transformers, as far as its arguments go."""

    title: str
    names: frozenset[str]  # the parameters it names; none that only ``**kwargs`` would take
    cache: str  # what it calls the K/V cache

    @classmethod
    def of(cls, *functions: Callable[..., Any]) -> Callee:
        """Read signatures, whatever decorators are on them. Of several, the first that names a cache says how.

        Raises:
            MechanismError: if none names a cache.
        """
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = [
            {name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds}
            for function in functions
        ]
        title = getattr(functions[0], "__qualname__", repr(functions[0]))
        for names in found:
            for cache in CACHE_NAMES:
                if cache in names:
                    return cls(title, frozenset.union(*map(frozenset, found)), cache)
        raise MechanismError(
            "handing on the K/V cache", f"{title} names no argument {' or '.join(CACHE_NAMES)}, as it must"
        )

    @property
    def accepted(self) -> frozenset[str]:
        """`names` in our words."""
        return self.names | {CACHE}

    def require(self, mechanism: str, names: Iterable[str]) -> None:
        """Raise a MechanismError if the callee does not name one of them: it would vanish in ``**kwargs``."""
        lost = [name for name in names if name not in self.accepted]
        if lost:
            raise MechanismError(mechanism, f"{self.title} names no argument {' or '.join(lost)}")

    def write(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments from arguments under our names.

        Raises:
            MechanismError: if the callee does not name one that is given and needed.
        """
        self.require("handing on the shortened prompt", [name for name in PROMPT if arguments.get(name) is not None])
        return {self.cache if name == CACHE else name: value for name, value in arguments.items()}


def is_cache(value: Any) -> bool:
    """Whether a value is a K/V cache, by what it can do."""
    return hasattr(value, "get_seq_length")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, whichever name the caller used; None without one.

    Raises:
        ValueError: if two caches are given under two names.
        MechanismError: if a cache stands under a name that no version known to us uses.
    """
    found = None
    for name in CACHE_NAMES:
        value = kwargs.get(name)
        if value is None or value is found:
            continue
        if found is not None:
            raise ValueError(f"pass one cache, got two, as {' and '.join(n for n in CACHE_NAMES if n in kwargs)}")
        found = value
    if found is None and not torch.compiler.is_compiling():
        for name, value in kwargs.items():
            if name not in CACHE_NAMES and is_cache(value):
                raise MechanismError(
                    "finding the K/V cache", f"a {type(value).__name__} came as {name!r}, not as {CACHE_NAMES[0]!r}"
                )
    return found


def read(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of any callee under our names; without a cache there is no `CACHE`.

    Raises:
        ValueError, MechanismError: as `cache_in` does.
    """
    cache = cache_in(kwargs)
    arguments = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    if cache is not None:
        arguments[CACHE] = cache
    return arguments


def bind(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name, as `read` gives them."""
    if not args:
        return read(kwargs)
    bound = inspect.signature(function).bind_partial(owner, *args, **kwargs).arguments
    bound.pop("self", None)
    return read({**bound, **bound.pop("kwargs", {})})


def tokens_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """``input_ids`` ``(B, S)`` or ``inputs_embeds`` ``(B, S, D)``, whichever a step is called with."""
    embeds = arguments.get(EMBEDS)
    tokens: torch.Tensor = arguments[IDS] if embeds is None else embeds
    return tokens


def past_length(cache: Any) -> int:
    """Columns that a cache stands for, 0 without one. Of a static cache on a GPU this copies a number to the host."""
    return 0 if cache is None else int(cache.get_seq_length())


def cache_of(output: Any) -> Any:
    """The K/V cache in what a model or `generate` returned, found by what it is, not by its name; None without one."""
    if isinstance(output, Mapping):
        values: Any = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    else:
        values = vars(output).values() if hasattr(output, "__dict__") else ()
    return next((value for value in values if is_cache(value)), None)
