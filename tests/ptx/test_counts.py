"""How much the longest program runs, against the committed baseline of this Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
from compiled import ROOT
from scripts import CACHE, HERE, jobs

UPDATE = "PYTHONPATH=.:tests/static python tests/ptx/counts.py --update"


@pytest.mark.emulates_all
def test_no_program_runs_longer_than_the_baseline():
    version = ".".join(metadata.version("triton").split(".")[:2])
    file = HERE / "baseline" / f"triton-{version}" / "counts.json"
    if not file.exists():
        pytest.skip(f"no baseline for this Triton: `{UPDATE}` writes {file.relative_to(ROOT)}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "static")])}
    command = [sys.executable, str(HERE / "counts.py"), "--jobs", jobs(), *CACHE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    message = "\n".join([done.stdout, done.stderr, f"if that is meant: `{UPDATE}`, and commit what it changed"])
    assert done.returncode == 0, message
