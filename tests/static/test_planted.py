"""The gate refuses kernels that were made worse on purpose."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import gate
import pytest
from compiled import run

SIGNS = {"divisibility": "of 128 bits", "upcast": "MMA", "width": "registers|shared memory|local accesses"}


@pytest.fixture(scope="module")
def planted() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    return [json.loads(line) for line in run("planted.py").splitlines()]


def complaints(build: dict[str, Any]) -> list[str]:
    known = gate.load(gate.baseline_file(metadata.version("triton"), build["group"]))
    return gate.broken_rules(build) + (gate.growth(build, known) if known else [])


@pytest.mark.parametrize("regression", SIGNS)
def test_the_gate_refuses(regression, planted):
    builds = [build for build in planted if build["planted"] == regression]
    assert len(builds) >= 2
    for build in builds:
        found = "\n".join(complaints(build))
        assert any(sign in found for sign in SIGNS[regression].split("|")), f"{gate.name_of(build)}: {found}"
