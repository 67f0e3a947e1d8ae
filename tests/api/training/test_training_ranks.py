"""Two processes over gloo train one weight: the same on both, and that of a single process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from train_on_a_rank import SETTINGS, samples

from asymvlm import train_scorer

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_ranks_train_one_weight(tmp_path):
    paths = [str(HERE.parents[2] / folder) for folder in ("", "python_api", "tests/api", "tests/api/support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = str(HERE / "train_on_a_rank.py")
    started = [
        subprocess.Popen([sys.executable, script, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["weight"], second["weight"])
    assert first["ranks"] == second["ranks"] == 2
    alone = train_scorer(tiny.build("llava"), samples(), validation=samples()[:3], **SETTINGS)
    assert torch.allclose(first["weight"], alone.weight, atol=1e-4)
    assert first["gaps"] == second["gaps"]
    assert abs(first["gaps"] - alone.gaps.mean) < 1e-4
    assert (tmp_path / "training_state.safetensors").is_file()
