"""`asymvlm doctor` names what runs here, and its self-test can fail."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers

import asymvlm
from asymvlm.cli import doctor
from asymvlm.hf import versions
from asymvlm_cli import main
from asymvlm_kernels import PrunedSequence, prune_sequence


def test_json_names_versions_backend_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["versions"]["asymvlm-kernels"] == asymvlm.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert "flash-attn" in record["versions"]  # null where absent
    assert record["backend"]["backend"] in record["backend"]["available"]
    assert record["backend"]["reason"]
    assert record["supported_models"] == asymvlm.supported_models()
    assert [test["device"] for test in record["self_test"]] == [device["device"] for device in record["devices"]]
    assert all(test["ok"] for test in record["self_test"])


def test_says_why_the_cuda_library_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASYMVLM_CUDA_LIBRARY", "/no/such/file.so")
    assert main(["doctor", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)["backend"]["available"]["cuda"]
    assert not state["ok"]
    assert "/no/such/file.so cannot be loaded" in state["reason"]


def test_table_says_absent_and_ok(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, "backend", "llava", "self-test", "ok (prune_sequence on cpu"):
        assert word in text


@pytest.mark.parametrize("there", [True, False])
def test_says_what_processors_with_a_video_part_need(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torchvision" and not there else "1.0")
    assert main(["doctor"]) == 0
    text = "".join(capsys.readouterr().out.split())  # the table breaks lines
    assert ("torchvisionabsent:modelswhoseprocessorhasavideopart" in text) == (not there)
    assert ("pipinstall'asymvlm-kernels[vision]'" in text) == (not there)


@pytest.mark.parametrize("installed,verdict", [("5.24.3", "the installed one is"), ("5.99.0", "NOT the installed one")])
def test_says_whether_transformers_is_a_tested_one(
    installed: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers, "__version__", installed)
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["transformers"]
    assert record == {"tested": list(versions.TESTED), "installed_is_tested": not verdict.startswith("NOT")}
    assert main(["doctor"]) == 0
    assert verdict in " ".join(capsys.readouterr().out.split())


def wrong_count(*arguments: Any, **keywords: Any) -> PrunedSequence:
    pruned = prune_sequence(*arguments, **keywords)
    return dataclasses.replace(pruned, index=pruned.index[:, 1:], embeds=pruned.embeds[:, 1:])


def wrong_rows(*arguments: Any, **keywords: Any) -> PrunedSequence:
    pruned = prune_sequence(*arguments, **keywords)
    return dataclasses.replace(pruned, embeds=pruned.embeds.flip(1))


def crash(*_: Any, **__: Any) -> PrunedSequence:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    "wrong,told", [(wrong_count, "wanted"), (wrong_rows, "embeddings"), (crash, "no kernel image")]
)
def test_self_test_fails_on_a_wrong_kernel(
    wrong: Any, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "prune_sequence", wrong)
    assert main(["doctor", "--json"]) == 1
    test = json.loads(capsys.readouterr().out)["self_test"][0]
    assert not test["ok"]
    assert told in test["problem"]
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in ("run", "heatmap", "doctor"):
        assert command in text
