"""`asymvlm train`, `calibrate` and `run --scorer`: from a JSONL file to an answer, resumable, errors in one line."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint import checkpoint, own_checkpoint, page

from asymvlm import Scorer, UniformBudget
from asymvlm.cli import main
from asymvlm.identity import ModelIdentity

__all__ = ["checkpoint", "own_checkpoint", "page"]  # fixtures


@pytest.fixture
def questions(page, tmp_path):
    file = tmp_path / "samples.jsonl"
    records = [
        {"image": str(page), "question": question, "answer": "due"}
        for question in ("What is due?", "what is what?", "is it due?")
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


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
    options = ("--average", 0.5, "--method", "linear", "--metric", "anls", "--max-new-tokens", 2)
    result = call(capsys, "calibrate", *source, "--scorer", learned, "-o", fitted, *options)
    assert result["average"] == pytest.approx(0.5, abs=0.1)
    assert result["samples"] == 3
    assert (fitted / "measurements" / "measurements.jsonl").is_file()
    calibrated = Scorer.from_pretrained(fitted)
    assert calibrated.weight.equal(scorer.weight)
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


def test_mistakes_are_one_line(checkpoint, questions, tmp_path, capsys):
    source = ("--model", checkpoint, "--device", "cpu")
    out = ("-o", tmp_path / "scorer")
    assert "wanted one of --data and --dataset, got neither" in fails(capsys, "train", *source, *out)
    assert "--keep: half found" in fails(capsys, "train", *source, *out, "--data", questions, "--keep", "half")
    assert "keep_ratio must be" in fails(capsys, "train", *source, *out, "--data", questions, "--keep", "2")
    assert "epochs must be" in fails(capsys, "train", *source, *out, "--data", questions, "--epochs", "0")
    missing = fails(capsys, "train", *source, "-o", tmp_path / "no" / "where", "--data", questions)
    assert "not a folder, wanted an existing one" in missing
    assert "no such folder" in fails(
        capsys, "calibrate", *source, *out, "--data", questions, "--scorer", tmp_path / "missing"
    )
    assert "average must be in (0, 1)" in fails(
        capsys, "calibrate", *source, *out, "--data", questions, "--average", "1.5"
    )
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text(json.dumps({"image": "a.png", "question": "What?"}))
    assert "sample 1 has no answer" in fails(capsys, "calibrate", *source, *out, "--data", unanswered)
    assert "image" in fails(capsys, "train", *source, *out, "--data", unanswered)
