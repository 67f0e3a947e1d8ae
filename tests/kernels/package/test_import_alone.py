"""The kernels import, and the reference runs, where transformers or triton cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
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


def run_script(script: str, **more: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python_api'}", **more}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_looking_around_works_without_transformers():
    run_script("""
import inspect, sys
sys.modules["transformers"] = None
import asymvlm_kernels
from asymvlm_kernels import *
assert prune_sequence is asymvlm_kernels.prune_sequence
assert not hasattr(asymvlm_kernels, "patch")
assert "prune_sequence" in dict(inspect.getmembers(asymvlm_kernels))
try:
    asymvlm_kernels.patch
except AttributeError as error:
    assert "needs asymvlm and transformers" in str(error), error
""")


def test_a_second_import_in_one_process_works_and_obeys_its_own_backend():
    run_script(
        """
import sys
import torch
import asymvlm_kernels as first
for name in [name for name in sys.modules if name.split(".")[0] == "asymvlm_kernels"]:
    del sys.modules[name]
import asymvlm_kernels as second
assert first is not second
scores, q = torch.tensor([[0.1, 0.3, 0.2]]), torch.randn(1, 3, 2, 16, requires_grad=True)
for package in (first, second):
    assert package.select_tokens(scores, torch.tensor([2])).tolist() == [[1, 2, -1]]
    package.key_bias_attention(q, q, q, torch.zeros(1, 3)).sum().backward()
sys.modules["asymvlm_kernels.dispatch"]._why_not = lambda *args: "told so"
try:
    with second.use_backend("triton"):
        second.importance_gap(scores)
except second.BackendError as error:
    assert "told so" in str(error)
else:
    raise AssertionError("the ops of the first import ran")
"""
    )
