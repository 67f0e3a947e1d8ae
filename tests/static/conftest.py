"""The builds of every shipped kernel: compiled once a test run, in processes without the interpreter.

All of them take 8 minutes of processor time. `make test` builds everything for sm_90 and one case of each kernel for
the other architectures; `make gate` builds all.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any

import pytest
from compiled import run


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent  # one directory for all workers: the first builds, the others wait
    result = shared / "builds.jsonl"
    with (shared / "builds.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(run("builds.py", "--sample", "--jobs", str(os.cpu_count())))
    return [json.loads(line) for line in result.read_text().splitlines()]
