"""The kernels import, and the reference runs, where transformers or triton cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # importing it raises ImportError
import torch
import asymvlm_kernels as ak
index = ak.select_tokens(torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([2]))
assert index.tolist() == [[1, 2, -1]], index
assert not {absent} & {{name.split(".")[0] for name, module in sys.modules.items() if module is not None}}
if "triton" in {blocked}:
    try:
        with ak.use_backend("triton"):
            ak.importance_gap(torch.zeros(1, 4))
    except ak.BackendError as error:
        assert "triton cannot be imported" in str(error), error
    else:
        raise AssertionError("BackendError expected")
"""


def run(blocked: list[str], absent: set[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python_api'}"}
    environment.pop("TRITON_INTERPRET", None)
    script = SCRIPT.format(blocked=blocked, absent=absent)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blocked", [["transformers"], ["triton"], ["transformers", "triton"]], ids="+".join)
def test_imports_without(blocked):
    run(blocked, absent={*blocked, "asymvlm"})


def test_importing_the_kernels_does_not_import_transformers():
    run([], absent={"transformers", "asymvlm"})
