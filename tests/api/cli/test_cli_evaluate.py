"""`asymvlm evaluate` from the shell: a table or JSON, a file of options, mistakes in one line."""

from __future__ import annotations

import json

import pytest
from checkpoint import checkpoint, page

from asymvlm_cli import main

__all__ = ["checkpoint", "page"]  # fixtures


@pytest.fixture
def data(tmp_path, page):
    file = tmp_path / "qa.jsonl"
    lines = [{"image": str(page), "question": f"What is in line {n}?", "answer": "yes", "id": n} for n in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def asked(checkpoint, data, tmp_path):
    command = ["evaluate", "-m", str(checkpoint), "--data", str(data), "--device", "cpu", "--max-new-tokens", "2"]
    return [*command, "--method", "asymvlm,random", "-o", str(tmp_path / "out")]


def test_a_run_its_table_and_going_on(asked, data, tmp_path, capsys):
    assert main([*asked, "--keep", "1,0.5", "--metric", "exact", "--metric", "anls", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [("full", 1), ("asymvlm", 0.5), ("random", 0.5)]
    assert list(found["rows"][1]["metrics"]) == ["exact", "anls"]
    assert "evaluating: 6 of 6" in said.err, "progress speaks in a file too"
    page = ["--report", str(tmp_path / "page.html")]  # of a run that is finished
    assert (
        main([*asked, "--keep", "1,0.5", "--metric", "exact", "--metric", "anls", "--baseline", "random", *page]) == 0
    )
    table = capsys.readouterr().out
    assert "K/V, MiB" in (tmp_path / "page.html").read_text(encoding="utf-8")
    words = ("exact, 2 samples", "anls, 2 samples", "to random", "K/V a sample", "p-values", "page.html")
    assert [word for word in words if word not in table] == []
    data.write_text(data.read_text() + data.read_text())
    assert main([*asked, "--keep", "1,0.5", "--metric", "exact", "--metric", "anls"]) == 2
    assert "run.json is of another run: data.samples 2 on file, 4 now" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(asked, tmp_path, capsys):
    assert main([*asked, "--keep", "0.5", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 settings, 6 generations: full, asymvlm 0.5, random 0.5" in said
    assert "about 0:0" in said
    assert not (tmp_path / "out").exists()


def test_options_from_a_file_and_flags_that_win(checkpoint, data, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {checkpoint}\ndata: {data}\nmethod: [asymvlm, random]\nkeep: [1, 0.25]\nmetric: [exact, anls]\n"
        "device: cpu\nmax_new_tokens: 2\nlimit: 1\ndry-run: true\njson: true\n"
    )
    assert main(["evaluate", "--config", str(config), "--keep", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 1
    assert [(arm["method"], arm["keep"]) for arm in found["arms"]][1:] == [("asymvlm", 0.5), ("random", 0.5)]


@pytest.mark.parametrize(
    "text,words",
    [
        ("model: m\nmetod: random\n", "run.yaml:2: 'metod' is no option, did you mean method?"),
        ("keep: 1\n\nkeep: 0.5\n", "run.yaml:3: 'keep' stands there twice"),
        ("model: m\nkeep: [1\n", "run.yaml:3: not YAML"),
        ("- model\n", "run.yaml:1: no key: value found"),
        ("keep: {a: 1}\n", "run.yaml:1: keep: {'a': 1} found, wanted text, a number, or a list"),
        ("dry-run: perhaps\n", "run.yaml:1: dry-run: 'perhaps' found, wanted true or false"),
        ("model: m\nlimit: many\n", "Invalid value for '--limit'"),
    ],
    ids=["unknown", "twice", "no YAML", "list", "mapping", "flag", "number"],
)
def test_mistakes_in_the_file(text, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["evaluate", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "more,words",
    [
        (["--method", "guess"], "--method: no method is called 'guess'"),
        (["--keep", "0.5,2"], "--keep: 2 found, wanted ratios in (0, 1], or 'own'"),
        (["--method", "random,random"], "--method: random,random found, wanted each once"),
        (["--method", "random", "--spread"], "--spread acts on 'asymvlm' and 'cosine'"),
        (["--metric", "vqa"], "qa.jsonl:1: metric vqa: 1 answers, wanted what 4 people or more answered"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--report", "page.pdf"], "--report: 'page.pdf' found, wanted the ending .html"),
        (["--report", "none/page.html"], "--report: 'none/page.html' found, wanted a file in a folder that is there"),
    ],
    ids=["method", "ratio", "twice", "spread of random", "metric", "file", "ending of a report", "folder of a report"],
)
def test_mistakes_need_no_model(asked, more, words, capsys, monkeypatch):
    monkeypatch.setattr("asymvlm.cli.console.open_session", None)
    assert main([*asked, *more]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_line_that_is_no_sample_is_named(asked, data, capsys):
    data.write_text(data.read_text() + "{\n")
    assert main(asked) == 2
    assert "qa.jsonl:3: not JSON" in capsys.readouterr().err


def test_an_image_that_breaks_off_costs_what_follows_it_alone(asked, data, tmp_path, page, capsys):
    (tmp_path / "half.png").write_bytes(page.read_bytes()[:200])
    broken = {"image": "half.png", "question": "What?", "answer": "yes"}
    data.write_text(data.read_text() + json.dumps(broken) + "\n")
    assert main([*asked, "--keep", "0.5"]) == 2
    assert "qa.jsonl:3: image" in capsys.readouterr().err
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 6, "the samples before it"
    (tmp_path / "half.png").write_bytes(page.read_bytes())
    assert main([*asked, "--keep", "0.5"]) == 2, "other pixels, another run"
