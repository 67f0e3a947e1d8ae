"""`asymvlm warmup` compiles what a patched model's calls will ask Triton for, all of it, and tells what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import checkpoint, page

from asymvlm.cli import warmup as command
from asymvlm_cli import main
from asymvlm_kernels import Calls, Warmed, WarmedBuild

pytest.importorskip("triton")

__all__ = ["checkpoint", "page"]  # fixtures

ROOT = Path(__file__).parents[3]
FAMILIES = ("llava", "qwen2_5_vl", "gemma4", "kimi_k25")  # each carries or caches something else


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    script = ROOT / "tests" / "api" / "support" / "warmed_models.py"
    paths = (ROOT, ROOT / "python_api", ROOT / "tests" / "api", script.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script), *FAMILIES], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("warmed models")
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_a_patched_call_compiles_was_planned(models, family) -> None:
    needed, planned = models[family]["needed"], models[family]["planned"]
    kernels = {key.split()[0] for key in needed}
    assert {"_score_select_kernel", "_gather_sequence_kernel", "_move_slots_kernel", "_score_tokens_kernel"} <= kernels
    assert {key: call for key, call in needed.items() if key not in planned} == {}


@pytest.mark.slow
@pytest.mark.xdist_group("warmed models")
def test_a_plan_that_leaves_anything_out_is_found_out(models) -> None:
    needed = models[FAMILIES[0]]["needed"]
    assert len(models["thinned"]) == 10
    for number, planned in enumerate(models["thinned"]):
        assert set(needed) - set(planned), f"plan {number} misses nothing"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The compilations that the command asks for; each succeeds but the last of every second call."""
    asked: list[dict[str, Any]] = []

    def compile_kernels(calls: Calls, **options: Any) -> Warmed:
        asked.append({"calls": calls, **options})
        last = WarmedBuild("_b_kernel", "failed", 0.1, "PTXASError: no") if len(asked) % 2 == 0 else None
        builds = (WarmedBuild("_a_kernel", "compiled", 4.0), last or WarmedBuild("_b_kernel", "found", 0.1))
        return Warmed(options["arch"], "/cache", builds, 4.2)

    monkeypatch.setattr(command, "compile_kernels", compile_kernels)
    return asked


def test_the_model_decides_and_a_failed_build_is_exit_code_1(checkpoint, compiled, capsys, tmp_path) -> None:
    asked = ["warmup", "-m", str(checkpoint), "--arch", "90", "--lengths", "3000,700", "--jobs", "3"]
    assert main([*asked, "--json", "--cache", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["compiled"], record["found"], record["failed"]) == (1, 1, 0)
    assert (record["lengths"], record["arch"], record["cache"]) == ([700, 3000], 90, "/cache")
    config = json.loads((checkpoint / "config.json").read_text())
    calls = compiled[0]["calls"]
    assert calls.width == config["text_config"]["hidden_size"]
    assert calls.lengths == (700, 3000)
    assert (compiled[0]["jobs"], compiled[0]["folder"], compiled[0]["progress"]) == (3, tmp_path, sys.stderr)
    assert main([*asked, "--dtype", "float16"]) == 1
    assert "1 compiled, 1 failed for sm_90" in capsys.readouterr().out
    assert compiled[1]["calls"].dtype == torch.float16


@pytest.mark.parametrize(
    "more,words",
    [
        (["--lengths", "long"], "--lengths: long found, wanted whole numbers of tokens"),
        (["--lengths", "0,5"], "--lengths: 0 found, wanted 1 token or more"),
        (["--arch", "75"], "--arch must be one of 80, 86"),
        (["--jobs", "0"], "--jobs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(checkpoint, compiled, more, words, capsys) -> None:
    assert main(["warmup", "-m", str(checkpoint), "--arch", "90", *more]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not compiled


def test_a_model_that_is_none_is_told(tmp_path, compiled, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(["warmup", "-m", str(tmp_path), "--arch", "90"]) == 2
    assert "model_type 'bert', wanted one of" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_an_architecture_is_asked_for(checkpoint, compiled, capsys) -> None:
    assert main(["warmup", "-m", str(checkpoint)]) == 2
    assert "torch sees no CUDA device here: --arch must name one" in capsys.readouterr().err
