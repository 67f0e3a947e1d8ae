"""Compiled kernels on an emulated GPU, in processes without Triton's interpreter.

`make test-static` runs what finds its builds in the cache of tests/static, and little besides; `make ptx` runs
everything. The builds are kept in build/triton, as those of tests/static are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


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
