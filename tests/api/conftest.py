"""Tiny models: one of each family a session, and a copy of it for each test to patch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported

import copy
from collections import defaultdict
from collections.abc import Iterator

import pytest
import tiny
import torch
import transformers
from checks import set_tolerance
from model_state import changes, snapshot
from shared_models import build_once
from transformers import PreTrainedModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--diagonal",
        action="store_true",
        help="one variant (batch, dtype, ...) of a test of all families for each but the representative ones, "
        "another for each family",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_family: runs on all families, not only on the representative ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of what differs between families run on all of them, tests of ways to call on five that stand for all."""
    given = [name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0].split(",")]
    if "family" in metafunc.fixturenames and "family" not in map(str.strip, given):
        every = metafunc.definition.get_closest_marker("every_family") is not None
        metafunc.parametrize("family", list(tiny.FAMILIES) if every else tiny.REPRESENTATIVE, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--diagonal"):
        return
    families, found = list(tiny.FAMILIES), defaultdict(list)
    for item in items:
        name = (
            item.callspec.params.get("family")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if item.get_closest_marker("every_family") and name not in tiny.REPRESENTATIVE:
            found[item.path, item.originalname, name].append(item)
    chosen = {id(variants[families.index(name) % len(variants)]) for (_, _, name), variants in found.items()}
    left_out = {id(item) for variants in found.values() for item in variants} - chosen
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


@pytest.fixture(autouse=True)
def tolerance() -> None:
    set_tolerance()


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    name = request.param
    reason = tiny.FAMILIES[name].broken or tiny.FAMILIES[name].wrong_without_patch.get(request.node.originalname)
    if reason is not None:
        pytest.skip(f"the unpatched model fails here: {reason}")
    set_tolerance(tiny.FAMILIES[name].atol)
    return name


@pytest.fixture
def plain(family: str) -> Iterator[PreTrainedModel]:
    """The unpatched model, for oracles; shared by the session, so a test may not patch it."""
    model = build_once(family)
    if hasattr(model, "model") and hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # what the last call left behind; a stale one is read by calls with embeddings
    before = snapshot(model)
    yield model
    assert not changes(before, snapshot(model)), "a test changed the shared model"


@pytest.fixture
def model(plain: PreTrainedModel) -> PreTrainedModel:
    """The same model, for the test to patch."""
    return copy.deepcopy(plain)
