"""Modules by the names they had before the package was sorted into rooms, so that older imports go on.

`import asymvlm.strategy` gives a module that hands on what `asymvlm.settings.strategy` has, and warns. Names that
`asymvlm` itself exports never moved.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

MOVED = {
    "budget_file": "settings.budget_file",
    "cache_state": "prompt.state",
    "continuing": "prompt.continuing",
    "conversation": "patched.conversation",
    "eviction.report": "cache.report",
    "flops": "models.flops",
    "forward": "patched.forward",
    "handle": "patched.handle",
    "identity": "settings.identity",
    "in_flight": "patched.in_flight",
    "later_images": "prompt.later",
    "loading": "app.loading",
    "metrics": "app.metrics",
    "pictures": "files.pictures",
    "plot": "report.plot",
    "policies": "settings.policies",
    "positions": "tokens.positions",
    "samples": "app.samples",
    "scorer": "settings.scorer",
    "session": "app.session",
    "strategy": "settings.strategy",
    "tiles": "report.tiles",
    "weights": "settings.weights",
}
BESIDE = {"policies": ("settings.eviction",)}  # other modules that names of one moved to


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module of `MOVED` where no other finder does."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = fullname.partition(".")[2] in MOVED and fullname.startswith("asymvlm.")
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        homes = [f"asymvlm.{new}" for new in (MOVED[old], *BESIDE.get(old, ()))]
        module.__getattr__ = handed_on(module.__name__, *homes)  # type: ignore[method-assign]
        names = dict.fromkeys(name for home in homes for name in vars(importlib.import_module(home)))
        module.__dict__["__all__"] = [name for name in names if not name.startswith("_")]


def handed_on(old: str, *homes: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that looks in other modules, the first first, and warns once a place that asks."""

    def find(name: str) -> Any:
        folder = "__path__" in vars(sys.modules[old])
        if name.startswith("__") or (folder and importlib.util.find_spec(f"{old}.{name}") is not None):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")  # a module of the folder is imported next
        new = next((home for home in homes if hasattr(importlib.import_module(home), name)), None)
        if new is None:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(f"{old}.{name} moved to {new}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[new], name)

    return find


def install() -> None:
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
