"""Methods by name: those of the library, and those of installed packages in the entry-point group `asymvlm.methods`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from asymvlm.methods.before.controls import RandomTokens, Spiral, Stride
from asymvlm.methods.before.similarity import AsymVLM
from asymvlm.methods.cached.attention import LastRow
from asymvlm.methods.cached.controls import OldestFirst, RandomEviction

ENTRY_POINT_GROUP = "asymvlm.methods"
OURS: tuple[type[Any], ...] = (
    AsymVLM,
    RandomTokens,
    Stride,
    Spiral,
    LastRow,
    OldestFirst,
    RandomEviction,
)


def available_methods(moment: type[Any] = object) -> list[str]:
    """Names that ``method=`` takes, third-party ones included.

    Args:
        moment: `BeforeMethod` or `CachedMethod`, to list the library's own of that kind alone; others are not loaded.
    """
    ours = {kind.name for kind in OURS if issubclass(kind, moment)}
    return sorted(ours | set(entry_points(group=ENTRY_POINT_GROUP).names))


def find_method(method: Any, moment: type[Any]) -> Any:
    """A method as it was given: an object, or the name of one that needs no arguments.

    Raises:
        ValueError: for a name that nobody has; the message lists the known ones.
        TypeError: for anything that is no method of this ``moment``.
    """
    found = _named(method, moment) if isinstance(method, str) else method
    if isinstance(found, type) and issubclass(found, moment):
        found = found()
    if not isinstance(found, moment):
        raise TypeError(f"method must be a {moment.__name__} or the name of one, got {method!r}")
    return found


def _named(name: str, moment: type[Any]) -> Any:
    for kind in OURS:
        if kind.name == name and issubclass(kind, moment):
            return kind
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return entry.load()
    raise ValueError(f"no method is called {name!r}; known: {', '.join(available_methods(moment))}")
