"""`asymvlm train`, `calibrate` and `run --scorer`: from a JSONL file to an answer, resumable, errors in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint import checkpoint, own_checkpoint, page
from safetensors.torch import save_file

from asymvlm import Scorer, Spread, UniformBudget, train_scorer
from asymvlm.cli import console, options
from asymvlm.settings.identity import ModelIdentity
from asymvlm.training.passes import FrozenModel
from asymvlm.training.progress import progress_bar
from asymvlm.training.state import TrainingState
from asymvlm_cli import main

__all__ = ["checkpoint", "own_checkpoint", "page"]  # fixtures


@pytest.fixture
def questions(page, tmp_path):
    file = tmp_path / "samples.jsonl"
    records = [
        {"image": str(page), "question": question, "answer": "due"}
        for question in ("What is due?", "Name every number on this page", "k")
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def model_of_a_family():
    return tiny.build("llava")


def call(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("asymvlm: error:")
    return error


@pytest.mark.slow
def test_train_calibrate_run(checkpoint, page, questions, tmp_path, capsys):
    learned, fitted = tmp_path / "learned", tmp_path / "fitted"
    source = ("--model", checkpoint, "--data", questions, "--device", "cpu")
    record = call(capsys, "train", *source, "-o", learned, "--epochs", 2, "--batch-size", 2, "--keep", "0.4,0.6")
    assert record["samples"] == 3
    assert record["steps"] == 4
    assert record["budget"] == {"type": "uniform", "ratio": 0.5}
    scorer = Scorer.from_pretrained(learned)
    assert not scorer.weight.eq(1).all()
    again = call(capsys, "train", *source, "-o", learned, "--epochs", 2, "--batch-size", 2, "--keep", "0.4,0.6")
    assert again == record  # the finished run is taken up and has nothing left to do
    chosen = (
        "--average",
        0.5,
        "--method",
        "linear",
        "--metric",
        "anls",
        "--max-new-tokens",
        2,
        "--spread",
        "--background",
        1,
    )
    result = call(capsys, "calibrate", *source, "--scorer", learned, "-o", fitted, *chosen)
    assert result["average"] == pytest.approx(0.5, abs=0.1)
    assert result["samples"] == 3
    assert (fitted / "measurements" / "measurements.jsonl").is_file()
    calibrated = Scorer.from_pretrained(fitted)
    assert calibrated.weight.equal(scorer.weight)
    assert calibrated.calibration["spread"] == {"reach": 4, "share": 0.7}
    assert calibrated.calibration["background"] == 1
    assert calibrated.budget.mean_gap == pytest.approx(calibrated.gaps.mean)
    asked = ("run", "--model", checkpoint, "--image", page, "--question", "What is due?", "--scorer", fitted)
    answer = call(capsys, *asked, "--device", "cpu", "--max-new-tokens", 2)
    assert answer["budget"] == result["budget"]
    drawn = call(capsys, "heatmap", *asked[1:], "--device", "cpu", "-o", tmp_path / "map.png")
    assert drawn["budget"] == result["budget"]
    answer = call(capsys, *asked, "--keep", 0.25, "--device", "cpu", "--max-new-tokens", 2)
    assert answer["budget"] == {"type": "uniform", "ratio": 0.25}
    assert answer["report"]["kept"] == [4]


def test_a_scorer_of_another_model_is_refused_until_vouched_for(own_checkpoint, page, tmp_path, capsys):
    width = json.loads((own_checkpoint / "config.json").read_text())["text_config"]["hidden_size"]
    Scorer(torch.ones(width), ModelIdentity(width, "llava", "owner/other", "f"), UniformBudget(0.25)).save_pretrained(
        tmp_path / "other"
    )
    asked = ("run", "-m", own_checkpoint, "-i", page, "-q", "What is due?", "-s", tmp_path / "other", "--device", "cpu")
    assert "trained for another model" in fails(capsys, *asked)
    assert call(capsys, *asked, "--any-model", "--max-new-tokens", 1)["report"]["kept"] == [4]


def test_spread_is_that_of_the_calibration_where_its_budget_is_used(caplog):
    fitted, budget = {"reach": 2, "share": 0.5}, UniformBudget(0.25)
    scorer = Scorer(
        torch.ones(8), ModelIdentity(8, "llava", "a/b", "f"), budget, calibration={"spread": fitted, "background": 4}
    )
    session = SimpleNamespace(processor=None)

    def settings(budget=None, **given):
        return options.vision_settings(session, scorer, False, budget, "all", **given)

    assert settings().spread == settings(spread=True).spread == Spread(**fitted)
    assert settings().background == 4
    assert settings(UniformBudget(0.5)).background == 0
    assert settings(UniformBudget(0.5)).spread is None
    assert settings(UniformBudget(0.5), spread=True).spread == Spread()
    assert settings(at_least_relevant=True).at_least_relevant is True
    assert not caplog.records
    assert settings(spread=False).spread is None
    assert "it keeps another share" in caplog.text


@pytest.mark.parametrize(
    "given, method, words",
    [
        ({"spread": True}, "divprune", "--spread"),
        ({"spread": True}, "fastv", "--spread"),
        ({"at_least_relevant": True}, "vispruner", "--at-least-relevant"),
        ({"recall": "host"}, "random", "--recall needs a method that scores"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_go_together_are_told_as_they_are_typed(given, method, words):
    way = options.parse_method(method, None)
    with pytest.raises(ValueError, match=words):
        options.vision_settings(SimpleNamespace(processor=None), None, False, None, "all", way, **given)


def test_ctrl_c_saves_and_the_same_command_goes_on(checkpoint, questions, tmp_path, capsys, monkeypatch):
    source = ("train", "--model", checkpoint, "--data", questions, "--device", "cpu", "--batch-size", 1, "--epochs", 2)
    whole = call(capsys, *source, "-o", tmp_path / "whole")
    merge, merged = FrozenModel.merge, []

    def interrupted(frozen, inputs):
        merged.append(1)
        if len(merged) == 5:
            raise KeyboardInterrupt
        return merge(frozen, inputs)

    with monkeypatch.context() as patched:
        patched.setattr(FrozenModel, "merge", interrupted)
        assert main([*map(str, source), "-o", str(tmp_path / "cut")]) == 130
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "asymvlm: interrupted after step 4 of 6; the same command goes on from there"
    assert "training scorer: 0 of 6, begins" in said
    assert any(line.startswith("loading ") for line in said)
    assert call(capsys, *source, "-o", tmp_path / "cut") | {"output": ""} == whole | {"output": ""}
    weights = [Scorer.from_pretrained(tmp_path / name).weight for name in ("cut", "whole")]
    assert weights[0].equal(weights[1])


def test_sigterm_is_ctrl_c(checkpoint, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FrozenModel, "merge", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    source = ("--model", checkpoint, "--data", questions, "--device", "cpu", "-o", tmp_path / "cut")
    assert main([*map(str, ("train", *source))]) == 130
    assert "interrupted after step 0 of 1; the same command" in capsys.readouterr().err
    assert main([*map(str, ("calibrate", *source, "--method", "relative"))]) == 130
    assert "asymvlm: interrupted; what was measured is in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_samples_and_prompts_lack_is_said_and_recorded(checkpoint, questions, page, tmp_path, capsys):
    with questions.open("a") as file:
        file.write("\n" + json.dumps({"image": str(page), "question": "Who?"}))
    source = ("train", "--model", checkpoint, "--data", questions, "--device", "cpu", "-o", tmp_path / "scorer")
    assert main([*map(str, source), "--json"]) == 0
    printed = capsys.readouterr()
    record, training = json.loads(printed.out), Scorer.from_pretrained(tmp_path / "scorer").training
    assert "1 of 4 samples have no answer" in printed.err
    assert record["samples_without_answer"] == training["samples_without_answer"] == 1
    assert record["chat_template"] is training["chat_template"] is True
    shutil.copytree(checkpoint, tmp_path / "bare")
    for file in ("chat_template.jinja", "processor_config.json", "tokenizer_config.json"):
        if (tmp_path / "bare" / file).is_file() and file.endswith("jinja"):
            (tmp_path / "bare" / file).unlink()
        elif (tmp_path / "bare" / file).is_file():
            config = json.loads((tmp_path / "bare" / file).read_text())
            (tmp_path / "bare" / file).write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    asked = ("run", "-m", tmp_path / "bare", "-i", page, "-q", "What?", "--device", "cpu", "--max-new-tokens", 1)
    assert main([*map(str, asked), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["chat_template"] is False
    assert "has no chat template: its prompt is an image placeholder" in printed.err


def test_a_folder_that_cannot_be_written_is_found_first(checkpoint, questions, tmp_path, capsys, monkeypatch):
    def full(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(console, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    error = fails(capsys, "train", "-m", checkpoint, "--data", questions, "-o", tmp_path / "out")
    assert f"--output: {tmp_path / 'out'} cannot be written (Read-only file system)" in error


def test_calibration_finds_early_what_cannot_be_compared(checkpoint, questions, page, tmp_path, capsys):
    source = ("calibrate", "--model", checkpoint, "--device", "cpu", "-o", tmp_path / "out", "--data", questions)
    assert "1 sample found, wanted two samples or more" in fails(capsys, *source, "--limit", 1)
    shown = {"image": str(page), "question": "What?", "answer": "due"}
    questions.write_text("\n".join([json.dumps(shown)] * 3))
    error = fails(capsys, *source)
    assert "the 3 samples have one importance gap" in error
    assert "take a uniform budget of 0.65, or --method 'relative'" in error
    measured = (tmp_path / "out" / "measurements" / "measurements.jsonl").read_text().splitlines()
    assert len(measured) == 1, "nothing was measured, the file has its header"


def test_progress_in_a_pipe_is_a_line_now_and_then(capsys):
    now = iter([0.0, 10.0, 31.0, 40.0, 45.0])
    with progress_bar("work", 4, shown=True, clock=lambda: next(now)) as advance:
        for step in range(4):
            advance(f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "work: 0 of 4, begins",
        "work: 2 of 4, 0:00:31, about 0:00:31 left, loss 1",
        "work: 4 of 4, 0:00:45, loss 3",
    ]


def test_a_state_that_is_none_is_named(tmp_path):
    (tmp_path / "training_state.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"training_state.safetensors is no state of a run .*: resume=False"):
        TrainingState.load(tmp_path, {})
    tensors = {name: torch.ones(2) for name in ("weight", "exp_avg", "exp_avg_sq", "best_weight")}
    for run, numbers in (("[1]", "{}"), ("{}", '{"colour": 1}'), ("{}", "[]")):
        save_file(tensors, tmp_path / "training_state.safetensors", {"run": run, "numbers": numbers})
        with pytest.raises(ValueError, match="is no state of a run"):
            TrainingState.load(tmp_path, {})


def test_saving_every_0_steps_is_refused(model_of_a_family):
    with pytest.raises(ValueError, match="save_every must be 1 step or more, got 0"):
        train_scorer(model_of_a_family, [{}], save_every=0)


def test_mistakes_are_one_line(checkpoint, questions, page, tmp_path, capsys):
    source = ("--model", checkpoint, "--device", "cpu")
    out = ("-o", tmp_path / "scorer")
    assert "wanted one of --data and --dataset, got neither" in fails(capsys, "train", *source, *out)
    assert "--keep: half found" in fails(capsys, "train", *source, *out, "--data", questions, "--keep", "half")
    assert "--keep must be" in fails(capsys, "train", *source, *out, "--data", questions, "--keep", "2")
    assert "--epochs must be" in fails(capsys, "train", *source, *out, "--data", questions, "--epochs", "0")
    missing = fails(capsys, "train", *source, "-o", tmp_path / "no" / "where", "--data", questions)
    assert "not a folder, wanted an existing one" in missing
    assert "no such folder" in fails(
        capsys, "calibrate", *source, *out, "--data", questions, "--scorer", tmp_path / "missing"
    )
    assert "--average must be in (0, 1)" in fails(
        capsys, "calibrate", *source, *out, "--data", questions, "--average", "1.5"
    )
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text(json.dumps({"image": str(page), "question": "What?"}))
    assert "sample 1 has no answer" in fails(capsys, "calibrate", *source, *out, "--data", unanswered)
    unanswered.write_text(json.dumps({"image": "a.png", "question": "What?"}))
    missing = fails(capsys, "train", *source, *out, "--data", questions, "--validation", unanswered)
    assert "1 of 1 image files are missing" in missing
