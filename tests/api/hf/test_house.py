"""The package's rooms and their floors: a room imports from those below it, so nothing turns in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import asymvlm

ROOT = Path(asymvlm.__file__).parent
# from the ground up; rooms of one floor do not know each other
FLOORS = [
    {"files", "models", "old_names"},
    {"hf"},
    {"tokens", "app"},
    {"methods"},
    {"settings"},
    {"prompt", "cache", "training"},
    {"report", "eviction", "inside"},
    {"patched"},
    {"patch"},
    {"calibration", "evaluation", "verification"},
    {"asymvlm", "cli"},  # __init__.py
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("asymvlm", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """What of the package a module imports as it is loaded: not for typing alone, not inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "asymvlm":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "asymvlm")
        elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.dump(getattr(node, "test", node)):
            yield from imported(node)


GRAPH = {name: set(imported(ast.parse(path.read_text()))) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return (module.split(".") + ["asymvlm"])[1] if module != "asymvlm" else "asymvlm"


def test_every_room_has_its_floor():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_room_imports_from_its_own_floor_or_above():
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) >= len(MODULES)


def test_every_file_can_be_read_at_a_sitting():
    assert [name for name, path in MODULES.items() if path.read_text().count("\n") > 300 and "phi3_v" not in name] == []
