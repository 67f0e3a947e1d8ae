"""How griffe is to read these sources: sections without a blank line between, and functions named as their modules."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(\s*)(Args|Returns|Raises|Yields|Attributes):[ ]*$", re.MULTILINE)


class Sources(griffe.Extension):
    """Docstrings here put no blank line between their sections, and griffe reads a section only behind one.

    Where a package exports a function under the name of the module that holds it, as ``asymvlm.patch``, griffe finds
    the module; the function is then found as ``asymvlm.patch()``.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(r"\n\1\2:", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for name, target in list(pkg.imports.items()):
            found = _exported(pkg, target)
            if found is not None and found.name == name:
                pkg.members[f"{name}()"] = griffe.Alias(f"{name}()", found, parent=pkg)


def _exported(package: griffe.Module, path: str) -> griffe.Object | None:
    """The function that a package exports by ``path``, where a module is found there; None where none is."""
    if not path.startswith(f"{package.path}."):
        return None
    parts = path.removeprefix(f"{package.path}.").split(".")
    found: Any = package
    for part in parts:
        if not found.is_module or part not in found.members:
            return None
        found = found.members[part]
    if found.is_alias:
        return None
    if found.is_function:
        clash = package.members.get(found.name)
        return found if clash is not None and clash.is_module else None
    return _exported(package, again) if (again := found.parent.imports.get(found.name)) not in (None, path) else None
