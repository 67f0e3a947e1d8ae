"""Compiled kernels on an emulated GPU, in processes without Triton's interpreter.

`make test-static` runs what finds its builds in the cache of tests/static, and little besides; `make ptx` runs
everything. The builds are kept in build/triton, as those of tests/static are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from compiled import ROOT, run

HERE = Path(__file__).parent
CACHE = ("--cache", str(ROOT / "build" / "triton"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs builds runs on the worker that builds those of tests/static, or on all where everything is run."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        if item.get_closest_marker("emulates_all"):
            item.add_marker("slow")
        elif item.path.stem in ("test_launches", "test_orders", "test_counts"):
            item.add_marker("slow")
            item.add_marker(pytest.mark.xdist_group("builds"))


def lines(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script of this directory prints."""
    pytest.importorskip("triton")
    return [json.loads(line) for line in run(str(HERE / script), *arguments, *CACHE).splitlines()]


def jobs() -> str:
    """Processes of one test: the other workers have tests of their own."""
    return str(max(1, (os.cpu_count() or 1) // 2))
