"""Without a CUDA device the Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any import of them


@pytest.hookimpl(wrapper=True)  # after the other conftest files have marked what is slow or in a group
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Slow tests start first: one that starts last keeps a single worker busy while the others are done."""
    yield
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if getattr(config.option, "loadgroup", False):
        for item in items:
            name_group(item)


def name_group(item: pytest.Item) -> None:
    """End the id of a test with its ``xdist_group``, by which pytest-xdist keeps the tests of a group on one worker.

    pytest-xdist 3.8 does so where pytest 9.2 no longer looks, and each worker then builds what a group shares.

    Raises UsageError: the id does not end so after all.
    """
    end = "".join(f"@{mark.args[0]}" for mark in item.iter_markers("xdist_group"))
    if not item.nodeid.endswith(end):
        item._id = type(item._id).parse(item.nodeid + end)
        if not item.nodeid.endswith(end):
            raise pytest.UsageError(f"{item.nodeid} should end with {end} for pytest-xdist: pytest has changed")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
