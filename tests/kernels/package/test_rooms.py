"""Who may import whom inside asymvlm_kernels: read from the files, whatever a run happens to import."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import asymvlm_kernels

ROOT = Path(asymvlm_kernels.__file__).parent
UNPROVEN = "asymvlm_kernels.unproven"


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by a relative path"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found & FILES.keys()


IMPORTS = {name: imported(file) for name, file in FILES.items()}


def importers(folder: str, of: str) -> dict[str, set[str]]:
    """Modules in ``folder`` that import a module in ``of``, with what they import."""

    def within(name: str, place: str) -> bool:
        return name == place or name.startswith(f"{place}.")

    found = {name: {m for m in imports if within(m, of)} for name, imports in IMPORTS.items() if within(name, folder)}
    return {name: modules for name, modules in found.items() if modules}


def test_no_circle():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the files


PHASES = ("prefill", "decode", "training")


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_needs_no_other(phase):
    for other in set(PHASES) - {phase}:
        assert not importers(f"asymvlm_kernels.{phase}", f"asymvlm_kernels.{other}")


@pytest.mark.parametrize(
    "below", ["_checks", "_triton", "device", "millionths", "ranking", "dispatch", "straight", "launch", "tuning"]
)
def test_the_ground_floor_knows_no_phase(below):
    for phase in (*PHASES, "budget"):
        assert not importers(f"asymvlm_kernels.{below}", f"asymvlm_kernels.{phase}")


def test_launching_knows_nothing_of_what_is_launched():
    room = "asymvlm_kernels.launch"
    known = set().union(*(IMPORTS[name] for name in FILES if name.startswith(room)))
    assert {name for name in known if not name.startswith(room)} == {"asymvlm_kernels._triton"}


def test_two_files_know_the_inside_of_triton():
    inside = ("triton.runtime", "triton.compiler", "triton.backends", "triton.knobs", "from triton import knobs")
    found = {name for name, file in FILES.items() if any(word in file.read_text(encoding="utf-8") for word in inside)}
    assert found == {"asymvlm_kernels.launch.interface", "asymvlm_kernels.warming.inside"}


def test_kernels_are_launched_in_one_place():
    """So that a launcher can be remembered."""
    subscripts = {
        name
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
    }
    assert subscripts == {"asymvlm_kernels.launch.record"}


def test_nothing_imports_what_is_unproven():
    outside = {name for name in importers("asymvlm_kernels", UNPROVEN) if not name.startswith(UNPROVEN)}
    assert not outside
    doors = {name for name, file in FILES.items() if UNPROVEN in file.read_text(encoding="utf-8")}
    assert {name for name in doors if not name.startswith(UNPROVEN)} == {"asymvlm_kernels.dispatch"}


def test_nothing_that_runs_knows_how_it_is_compiled_beforehand():
    warming = "asymvlm_kernels.warming"
    outside = {name for name in importers("asymvlm_kernels", warming) if not name.startswith(warming)}
    assert outside == {"asymvlm_kernels"}


def test_prune_sequence_is_met_at_the_door_of_its_folder():
    folder = "asymvlm_kernels.prefill.prune"
    for name, modules in importers("asymvlm_kernels", folder).items():
        if not name.startswith((folder, UNPROVEN)):
            assert modules == {folder}, name
