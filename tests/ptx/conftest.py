"""Compiled kernels on an emulated GPU, in processes without Triton's interpreter.

`make test-static` runs what finds its builds in the cache of tests/static, and little besides; `make ptx` runs
everything. The builds are kept in build/triton, as those of tests/static are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled import alone

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs kernels starts before the rest, in the order of the files: those of tests/static before."""
    for item in items:
        if HERE in item.path.parents and item.path.stem in ("test_launches", "test_orders", "test_counts"):
            item.add_marker("slow")


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a worker is building for tests/static is there, and found in the cache."""
    with alone("builds", tmp_path_factory):
        return
