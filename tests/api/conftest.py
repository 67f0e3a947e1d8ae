"""Tiny models: one of each family a session, and a copy of it for each test to patch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported

import copy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from checks import set_tolerance
from model_state import changes, snapshot
from shared_models import build_once
from transformers import PreTrainedModel

Run = tuple[pytest.Item, str, str]  # of a test: on a family, in a variant, which is the rest of its id

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--diagonal",
        action="store_true",
        help="of a test of several families as few runs as show each family and each variant (batch, dtype, ...) once",
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
    tests: dict[tuple[Path, str], list[Run]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "family" in item.callspec.params:
            family, parts = str(item.callspec.params["family"]), item.callspec.id.split("-")
            variant = "-".join(part for part in parts if part != family)
            tests[item.path, item.originalname].append((item, family, variant))
    left_out = {id(item) for runs in tests.values() for item in off_the_diagonal(runs)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


def off_the_diagonal(runs: list[Run]) -> list[pytest.Item]:
    """Of one test's runs, those that show no family and no variant that another does not."""
    families = list(dict.fromkeys(family for _, family, _ in runs))
    variants = list(dict.fromkeys(variant for _, _, variant in runs))
    shortest = min(len(families), len(variants))

    def from_diagonal(run: Run) -> int:
        family, variant = families.index(run[1]), variants.index(run[2])
        return (family - variant) % shortest

    met: set[tuple[str, str]] = set()
    others = []
    for item, family, variant in sorted(runs, key=from_diagonal):
        shown = {("family", family), ("variant", variant)}
        if shown <= met:
            others.append(item)
        met |= shown
    return others


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
