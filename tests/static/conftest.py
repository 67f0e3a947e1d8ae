"""The builds of every shipped kernel: compiled once a test run, in processes without the interpreter.

Triton compiles to PTX and ptxas to machine code. `make test-static` builds all cases of sm_90 and one case of each
kernel for the other architectures, in 375 s of one core; `make gate` builds all. Triton keeps every build in
build/triton under a key of sources, signature and options, so that a second run compiles what has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compiled import ROOT, alone, run


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for one compilation run on one worker, beside which the others go on."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            needed = {"builds", "planted", "library"}.intersection(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group(min(needed, default=item.path.stem)))
            if needed:
                item.add_marker("slow")


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    # as many processes as there are cores, though another worker has tests of its own: those are done long before
    with alone("builds", tmp_path_factory) as shared:
        result = shared / "builds.jsonl"
        if not result.exists():
            cache = ROOT / "build" / "triton"
            result.write_text(run("builds.py", "--sample", "--cache", str(cache)))
    return [json.loads(line) for line in result.read_text().splitlines()]
