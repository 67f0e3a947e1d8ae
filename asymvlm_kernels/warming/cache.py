"""Triton's cache on disk: where it is, what of this package lies in it, and one that came from somewhere else."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asymvlm_kernels._triton import HAS_TRITON
from asymvlm_kernels.warming.inside import cache_folder

PACKAGE = Path(__file__).resolve().parents[1]
GROUP = "__grp__"  # in front of the name of the file that lists a build's files, by their whole paths


def folder_of() -> str:
    """The folder that Triton keeps its builds in: ``TRITON_CACHE_DIR``, else in the home of the user."""
    if HAS_TRITON:
        return cache_folder()
    return os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")


@functools.cache
def kernels() -> frozenset[str]:
    """Names of this package's kernels."""
    sources = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    return frozenset(name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))


def describe(folder: str | None = None) -> dict[str, Any]:
    """What lies in a cache: ``folder``, ``builds`` of this package, their ``bytes``, and builds by ``architectures``.

    Builds of older sources count too: Triton never deletes any.
    """
    place = Path(folder or folder_of())
    count, size, architectures = 0, 0, Counter[str]()
    for group in _groups(place):
        name = group.name.removeprefix(GROUP).removesuffix(".json")
        if name in kernels():
            count += 1
            size += sum(file.stat().st_size for file in group.parent.iterdir() if file.is_file())
            architectures[_architecture(group.with_name(f"{name}.json"))] += 1
    return {"folder": str(place), "builds": count, "bytes": size, "architectures": dict(sorted(architectures.items()))}


def _groups(place: Path) -> Iterator[Path]:
    yield from sorted(place.glob(f"*/{GROUP}*.json"))


def _architecture(file: Path) -> str:
    try:
        return f"sm_{json.loads(file.read_text())['target']['arch']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def adopt(folder: str | Path) -> int:
    """Make a cache that was copied here from another path readable: Triton writes whole paths into it.

    Returns:
        How many builds are whole, of whatever package. Those that miss a file are left to be compiled anew.
    """
    whole = 0
    for group in _groups(Path(folder)):
        try:
            record = json.loads(group.read_text())
            paths = {name: str(group.parent.resolve() / name) for name in record["child_paths"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if record["child_paths"] != paths:
            partial = group.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(record | {"child_paths": paths}))
            os.replace(partial, group)
        whole += all(os.path.exists(path) for path in paths.values())
    return whole


def c_compiler() -> dict[str, Any]:
    """The C compiler that Triton will call when it first launches a kernel, found as Triton finds it.

    Returns:
        ``ok``; ``path``, None where there is none; ``reason`` in words, what is missing or where it comes from.
    """
    named = os.environ.get("CC")
    found = next((path for name in ([named] if named else ["gcc", "clang"]) if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if named and found is None:
        return {"ok": False, "path": None, "reason": f"CC={named} names no program, and Triton looks for no other"}
    if found is None:
        return {"ok": False, "path": None, "reason": "neither CC, gcc nor clang: Triton cannot launch without one"}
    if not headers.exists():
        return {"ok": False, "path": found, "reason": f"{headers} is missing (python3-dev): Triton compiles against it"}
    return {"ok": True, "path": found, "reason": "by CC" if named else "on the path"}
