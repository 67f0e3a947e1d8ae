"""`asymvlm chat` and the eviction options of `asymvlm run`: the library's numbers, from a script or a terminal."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from checkpoint import QUESTION, checkpoint, page
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm
from asymvlm import Conversation, TextEviction, TurnEviction, VisionPruning
from asymvlm.cli import chat, console
from asymvlm_cli import main

__all__ = ["checkpoint", "page"]  # fixtures

EVICTION = ["--text-threshold", "12", "--text-retention", "0.5", "--turn-threshold", "4", "--max-new-tokens", "20"]


def say(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


@pytest.fixture
def expected(checkpoint, page):
    """The same dialogue through the library."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    asymvlm.patch(model, vision=VisionPruning(), text=TextEviction(12, 0.5), turns=TurnEviction(4, 0.5))
    talk = Conversation(model, AutoProcessor.from_pretrained(checkpoint), max_new_tokens=20, do_sample=False)
    image = Image.open(page).convert("RGB")
    return [talk.ask(QUESTION, [image]), talk.ask("What?"), talk.ask("due?", [image]), talk.ask("Is it?")]


def test_a_scripted_dialogue_as_json(checkpoint, page, expected, monkeypatch, capsys):
    say(monkeypatch, QUESTION, "", "/stats", "What?", f"/image {page}", "due?", "Is it?", "/quit", "never")
    assert main(["chat", "--model", str(checkpoint), "--image", str(page), *EVICTION, "--json"]) == 0
    stdout, _ = capsys.readouterr()
    assert stdout.count("\n") == 1
    record = json.loads(stdout)
    assert [turn["answer"] for turn in record["turns"]] == [reply.text for reply in expected]
    assert [turn["images"] for turn in record["turns"]] == [1, 0, 1, 0]
    assert [turn["eviction"] for turn in record["turns"]] == [reply.report.eviction.to_dict() for reply in expected]
    assert sum(turn["eviction"]["evicted"][0] for turn in record["turns"]) > 20
    assert any(turn["eviction"]["answers"][0] for turn in record["turns"])


def test_a_scripted_dialogue_in_words(checkpoint, page, expected, monkeypatch, capsys):
    say(monkeypatch, QUESTION, "What?")
    assert main(["chat", "--model", str(checkpoint), "--image", str(page), *EVICTION]) == 0
    stdout, _ = capsys.readouterr()
    stats = expected[1].report.eviction.cache
    assert expected[1].text in stdout
    assert f"{stats.physical} of {stats.capacity} slots" in " ".join(stdout.split())


def test_a_terminal_shows_the_cache_while_the_answer_grows(checkpoint, page, monkeypatch):
    screen, shown = io.StringIO(), []
    view = chat.view
    monkeypatch.setattr(chat, "view", lambda text, stats: (shown.append((text, stats)), view(text, stats))[1])
    monkeypatch.setattr(console, "out", Console(file=screen, force_terminal=True, width=120))
    say(monkeypatch, QUESTION)
    assert main(["chat", "--model", str(checkpoint), "--image", str(page), *EVICTION]) == 0
    held = [stats.held[0] for _, stats in shown if stats is not None and stats.held]
    assert max(held) == 12
    assert any(later < earlier for earlier, later in itertools.pairwise(held)), "it shrinks"
    assert shown[-1][0].startswith(shown[5][0][:1])
    assert "slots" in screen.getvalue()


@pytest.mark.parametrize("arguments,words", [
    (["--text-threshold", "0"], "--text-threshold"), (["--text-retention", "2"], "--text-retention: 2 found"),
    (["--turn-retention", "none"], "--turn-retention: none found"), (["--turn-threshold", "-1"], "--turn-threshold"),
    (["--keep", "0"], "--keep"), (["--recall", "host", "--turn-threshold", "9"], "beside --turn-threshold"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_mistakes_are_one_line(arguments, words, checkpoint, capsys):
    assert main(["chat", "--model", str(checkpoint), *arguments]) == 2
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert words in stderr


@pytest.mark.parametrize("line, words", [("/image nothing.png", "no such file"), ("/dance", "unknown command /dance")])
def test_a_mistyped_command_costs_a_line_not_the_dialogue(line, words, checkpoint, monkeypatch, capsys):
    say(monkeypatch, "What is due?", line, "Who?")
    assert main(["chat", "--model", str(checkpoint), "--max-new-tokens", "2", "--json"]) == 2
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["turns"]) == 2
    assert words in next(said for said in printed.err.splitlines() if not said.startswith("loading"))


def test_a_question_that_cannot_be_asked_ends_a_script(checkpoint, monkeypatch, capsys):
    say(monkeypatch, "What is <image>?")
    assert main(["chat", "--model", str(checkpoint)]) == 2
    assert capsys.readouterr().err.count("asymvlm: error: ") == 1


def test_run_evicts(checkpoint, page, capsys):
    asked = ["run", "--model", str(checkpoint), "--image", str(page), "--question", QUESTION, "--max-new-tokens", "20"]
    evicting = ["--text-threshold", "6", "--text-retention", "0.5"]
    assert main([*asked, *evicting, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["report"]["eviction"]["evicted"] == [16]
    assert main([*asked, *evicting, "--compare"]) == 0
    assert "text eviction: 16 of 19 generated tokens evicted" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["eviction"] is None
    assert main([*asked, "--text-retention", "0.5"]) == 2
    assert "without --text-threshold" in capsys.readouterr().err


def test_dropped_tokens_come_back_to_a_dialogue(checkpoint, page, monkeypatch, capsys):
    vision = VisionPruning(spread=asymvlm.Spread(), at_least_relevant=True, recall="host")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    asymvlm.patch(model, vision=vision)
    talk = Conversation(model, AutoProcessor.from_pretrained(checkpoint), max_new_tokens=4, do_sample=False)
    expected = [talk.ask(QUESTION, [Image.open(page).convert("RGB")]), talk.ask("alpha beta"), talk.ask("due?")]
    asked = ["chat", "--model", str(checkpoint), "--image", str(page), "--max-new-tokens", "4"]
    asked += ["--spread", "--at-least-relevant", "--recall", "host"]
    say(monkeypatch, QUESTION, "alpha beta", "due?")
    assert main([*asked, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["turns_policy"]) == (None, None)
    assert [turn["answer"] for turn in record["turns"]] == [reply.text for reply in expected]
    recalled = [turn["recall"]["recalled"] for turn in record["turns"]]
    assert recalled == [reply.report.recall.recalled for reply in expected]
    assert sum(map(sum, recalled)) > 0
    say(monkeypatch, "Who?", "/stats")
    assert main(["chat", "--model", str(checkpoint), "--max-new-tokens", "2", "--recall", "device"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cache: no vision tokens yet" in shown
