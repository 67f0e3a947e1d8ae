"""The command says at once what needs no model: help, versions and mistakes do not wait for torch."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint import checkpoint, page

from asymvlm.app.loading import load
from asymvlm.app.session import InputError
from asymvlm.cli import options
from asymvlm_cli import commands, main

__all__ = ["checkpoint", "page"]  # fixtures

HEAVY = {"torch", "transformers", "asymvlm", "asymvlm_kernels", "PIL", "numpy"}
ROOT = Path(__file__).parents[3]


def started(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, what was printed, and which heavy packages were imported, of the command in a process of its own."""
    code = (
        "import sys; from asymvlm_cli import main; code = main(sys.argv[1:]);"
        f"print('\\nimported', *sorted({HEAVY!r} & set(sys.modules))); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_api")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    said, _, imported = done.stdout.rpartition("\nimported")
    return done.returncode, said + done.stderr, set(imported.split())


@pytest.mark.parametrize(
    "arguments,code,words",
    [
        (["--help"], 0, ["run", "heatmap", "calibrate", "--version", "--install-completion"]),
        ([], 0, ["Usage"]),
        (["--version"], 0, ["asymvlm-kernels 0.", "torch 2.", "transformers 5.", "Python 3."]),
        (["run", "--help"], 0, ["--load-in-4bit", "--device-map", "--top-p", "@FILE"]),
        (["run", "--model", "m"], 2, ["asymvlm: error: Missing option", "--image"]),
        (["walk"], 2, ["asymvlm: error: No such command 'walk'"]),
        (["run", "--colour"], 2, ["No such option", "--colour"]),
        (["chat", "--max-new-tokens", "0"], 2, ["asymvlm: error: Invalid value", "--max-new-tokens"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_imports_none(arguments: list[str], code: int, words: list[str]) -> None:
    found, said, imported = started(*arguments)
    assert found == code, said
    assert imported == set()
    assert all(word in said for word in words), said


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.__name__)
def test_options_and_work_fit_together(command) -> None:
    """Every option reaches an argument of the function that does the work, or the loading of the model."""
    name = command.__name__
    work = inspect.signature(getattr(importlib.import_module(f"asymvlm.cli.{name}"), name)).parameters
    told = set(inspect.signature(command).parameters)
    named = {parameter for parameter in work if parameter != "loading"}
    loading = set(inspect.signature(load).parameters) - {"model"} if "loading" in work else set()
    assert told == named | loading


@pytest.mark.slow
def test_python_m_asymvlm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asymvlm", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_api")])},
        check=True,
    )
    assert done.stdout.startswith("asymvlm-kernels 0.")


def test_a_question_from_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "question.txt").write_text("What is\ndue?\n", encoding="utf-8-sig")
    assert options.parse_question(f"@{tmp_path / 'question.txt'}") == "What is\ndue?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" Who? \n"))
    assert options.parse_question("-") == "Who?"
    with pytest.raises(InputError, match=r"--question: .*none.txt: cannot be read .*; a question that begins with @"):
        options.parse_question(f"@{tmp_path / 'none.txt'}")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(InputError, match="'-' found, wanted some text"):
        options.parse_question("-")


@pytest.mark.parametrize(
    "more,words",
    [
        (["--temperature", "0"], "--temperature: 0.0 found, wanted a number above 0"),
        (["--top-p", "1.5"], "--top-p: 1.5 found, wanted a probability"),
        (["--device", "gpu"], "--device: 'gpu' found, wanted auto, cpu, cuda"),
        (["--device", "cpu", "--device-map", "auto"], "--device cpu and --device-map auto exclude each other"),
        (["--load-in-8bit", "--load-in-4bit"], "exclude each other"),
        (["--load-in-4bit"], "--load-in-4bit needs the package bitsandbytes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_told(checkpoint, page, more, words, capsys, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    assert main(["run", "-m", str(checkpoint), "-i", str(page), "-q", "What?", *more]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(checkpoint, page, capsys) -> None:
    assert main(["run", "-m", str(checkpoint), "-i", str(page), "-q", "What?", "--device", "cuda:7"]) == 2
    assert "device 'cuda:7' was asked for but torch sees no CUDA device" in capsys.readouterr().err


def test_drawn_answers_follow_from_the_seed(checkpoint, page, capsys) -> None:
    def answer(*more: str) -> str:
        asked = ["run", "-m", str(checkpoint), "-i", str(page), "-q", "What?", "--max-new-tokens", "12", *more]
        assert main([*asked, "--device", "cpu"]) == 0
        return capsys.readouterr().out.split("\n\n")[0]

    drawn = [answer("--temperature", "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer() == answer("--seed", "3"), "greedy draws nothing"


def test_weights_spread_by_a_device_map(checkpoint) -> None:
    pytest.importorskip("accelerate")
    session = load(str(checkpoint), device_map="auto")
    assert all(parameter.device.type != "meta" for parameter in session.model.parameters())
