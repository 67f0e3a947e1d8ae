"""A mistake is one line on stderr that names what was found and what was wanted, and exit code 2; never a traceback."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint import checkpoint, own_checkpoint, page
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from asymvlm.cli import console
from asymvlm_cli import main

__all__ = ["checkpoint", "own_checkpoint", "page"]  # fixtures

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command, assert that it ends as a mistake does, and return its line."""

    def call(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        stdout, stderr = capsys.readouterr()
        assert code == 2, stderr
        assert stdout == ""
        *before, line = stderr.splitlines(keepends=True)
        assert line.startswith("asymvlm: error: ")
        assert line.endswith("\n")
        assert all(said.startswith("loading ") for said in before), stderr
        return line

    return call


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts to load a model for arguments that are wrong by themselves."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(console, "load", load)


@pytest.mark.parametrize("command", ["run", "heatmap"])
@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--image", "{tmp}/none.png", "--question", "q"], ["none.png", "no such file", "image file"]),
        (["--image", "{tmp}", "--question", "q"], ["a folder", "wanted an image file"]),
        (["--image", "{text}", "--question", "q"], ["text.png", "not a format", "PNG, JPEG"]),
        (["--image", "{torn}", "--question", "q"], ["torn.png", "cannot be read", "whole image file"]),
        (["--image", "{page}", "--question", "  "], ["--question", "'  '", "wanted some text"]),
        (["--image", "{page}", "--question", "q", "--keep", "0"], ["--keep: 0 found", "(0, 1]"]),
        (["--image", "{page}", "--question", "q", "--keep", "1.5"], ["--keep: 1.5 found", "(0, 1]"]),
        (["--image", "{page}", "--question", "q", "--keep", "nan"], ["--keep: nan found", "(0, 1]"]),
        (["--image", "{page}", "--question", "q", "--keep", "much"], ["--keep: much found", "(0, 1]"]),
        (["--image", "{page}", "--question", "q", "--keep", "0.5", "--budget", "{text}"], ["--keep 0.5", "--budget"]),
        (
            ["--image", "{page}", "--question", "q", "--budget", "{tmp}/none.json"],
            ["none.json", "cannot be read", "No such file"],
        ),
        (["--image", "{page}", "--question", "q", "--budget", "{text}"], ["text.png", "not JSON"]),
        (["--image", "{page}", "--question", "q", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--image", "{page}", "--question", "q", "--colour", "red"], ["--colour"]),
        (["--image", "{page}"], ["--question"]),
    ],
)
def test_wrong_arguments_are_told_before_a_model_is_loaded(
    command: str,
    arguments: list[str],
    words: list[str],
    refused: Refused,
    nothing_loaded: None,
    page: Path,
    tmp_path: Path,
) -> None:
    text, torn = tmp_path / "text.png", tmp_path / "torn.png"
    text.write_text("this is no image\nand no JSON\n")
    torn.write_bytes(page.read_bytes()[:200])
    places = {"tmp": tmp_path, "text": text, "torn": torn, "page": page}
    extra = ["--output", str(tmp_path / "out.png")] if command == "heatmap" else []
    line = refused(command, "--model", "m", *(word.format(**places) for word in arguments), *extra)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "output,words",
    [("out", ["ending ''", ".png"]), ("out.docx", [".docx", ".png"]), ("none/out.png", ["none", "existing"])],
)
def test_output_that_cannot_be_written(
    output: str, words: list[str], refused: Refused, nothing_loaded: None, page: Path, tmp_path: Path
) -> None:
    line = refused("heatmap", "--model", "m", "--image", page, "--question", "q", "--output", tmp_path / output)
    for word in words:
        assert word in line


def test_unknown_command(refused: Refused) -> None:
    assert "fly" in refused("fly")


def test_missing_matplotlib_names_the_extra(
    refused: Refused, nothing_loaded: None, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import raises ImportError
    line = refused("heatmap", "--model", "m", "--image", page, "--question", "q", "--output", tmp_path / "o.png")
    assert "pip install 'asymvlm-kernels[plot]'" in line


def ask(model: object, page: Path) -> list[object]:
    return ["run", "--model", model, "--image", page, "--question", "q", "--max-new-tokens", "1"]


@pytest.mark.parametrize(
    "model,words",
    [
        ("{tmp}", ["no config.json", "save_pretrained"]),
        ("{tmp}/none", ["no such folder", "hub repository"]),
        ("{tmp}/file", ["is a file", "hub repository"]),
        ("", ["''", "hub repository"]),
        ("nobody/no-such-model", ["cannot load model", "nobody/no-such-model"]),  # the tests run offline
        ("bad id with spaces", ["cannot load model", "bad id with spaces"]),
    ],
)
def test_model_that_is_not_there(model: str, words: list[str], refused: Refused, page: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(*ask(model.format(tmp=tmp_path), page))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "config,words",
    [
        ({"model_type": "bert"}, ["model_type 'bert'", "wanted one of", "llava"]),
        ({"model_type": "new", "auto_map": {"AutoConfig": "own.Config"}}, ["model_type 'new'", "llava"]),  # not run
        ({}, ["model_type None", "llava"]),
        ([], ["wanted"]),
    ],
)
def test_model_type_that_is_not_supported(
    config: object, words: list[str], refused: Refused, page: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(*ask(tmp_path, page))
    for word in words:
        assert word in line


def test_checkpoint_without_a_processor(refused: Refused, page: Path, own_checkpoint: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (own_checkpoint / name).unlink()
    assert "processor" in refused(*ask(own_checkpoint, page))


def test_torn_weights(refused: Refused, page: Path, own_checkpoint: Path) -> None:
    weights = own_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"cannot load the weights of {str(own_checkpoint)!r}" in refused(*ask(own_checkpoint, page))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_missing(refused: Refused, page: Path, checkpoint: Path) -> None:
    assert "no CUDA device" in refused(*ask(checkpoint, page), "--device", "cuda")


def test_question_that_holds_the_placeholder(refused: Refused, page: Path, checkpoint: Path) -> None:
    arguments = ["--model", checkpoint, "--image", page, "--question", "what is <image>?"]
    assert "'<image>', the placeholder of an image" in refused("run", *arguments)


def test_weights_missing_from_a_checkpoint_are_not_silently_random(
    own_checkpoint: Path, page: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(own_checkpoint / "model.safetensors")
    name = next(name for name in weights if "o_proj" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name},
        own_checkpoint / "model.safetensors",
        {"format": "pt"},
    )
    with caplog.at_level(logging.WARNING, "asymvlm"):
        assert main([str(argument) for argument in ask(own_checkpoint, page)]) == 0
    assert "1 weights are not in" in caplog.text
    assert "o_proj" in caplog.text


def test_a_bug_keeps_its_traceback(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(console, "load", load)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main([str(argument) for argument in ask("m", page)])


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.slow
def test_a_process_ends_with_code_2_and_one_line(verbose: bool, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    arguments = ["--verbose"] * verbose + [
        "run",
        "--model",
        "m",
        "--image",
        str(tmp_path / "none.png"),
        "--question",
        "q",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "asymvlm.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python_api'}"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("asymvlm: error: image ")
    assert ("Traceback" in done.stderr) == verbose, "--verbose shows where it came from"
    assert verbose or done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "message,words",
    [
        (
            "\nQwen2VLVideoProcessor requires the Torchvision library but it was not\nfound.",
            "it needs torchvision, which",
        ),
        ("Package `num2words` is required to run SmolVLM processor.", "it needs num2words, which"),
        ("\nA processor needs\nanother package.\n", "A processor needs another package."),
    ],
)
def test_a_processor_without_its_package_names_the_command(
    message: str, words: str, own_checkpoint: Path, page: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError(message)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    line = refused(*ask(own_checkpoint, page))
    assert words in line
    assert ("pip install 'asymvlm-kernels[vision]'" in line) == ("it needs" in line)


@pytest.mark.parametrize("name", ["~nobody_at_all/page.png", f"{'a' * 300}.png"], ids=["nobody's home", "a long name"])
@pytest.mark.parametrize("option", ["--image", "--question", "--scorer", "--model", "--budget"])
def test_paths_that_cannot_be_are_told_in_a_line(option: str, name: str, page: Path, refused: Refused) -> None:
    given = {"--model": "no/such/model", "--image": str(page), "--question": "q"}
    given[option] = f"@{name}" if option == "--question" else name
    line = refused("run", *(word for pair in given.items() for word in pair))
    assert name in line
