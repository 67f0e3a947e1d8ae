"""The scripts of this directory, run where Triton compiles: the test process itself may be set to interpret."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from compiled import ROOT, run

HERE = Path(__file__).parent
CACHE = ("--cache", str(ROOT / "build" / "triton"))


def lines(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script of this directory prints."""
    pytest.importorskip("triton")
    return [json.loads(line) for line in run(str(HERE / script), *arguments, *CACHE).splitlines()]


def jobs() -> str:
    """Processes of one test: the other workers have tests of their own."""
    return str(max(1, (os.cpu_count() or 1) // 2))
