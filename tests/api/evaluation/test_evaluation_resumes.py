"""A run that is killed at any moment and started again gives the files of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoint import checkpoint, page
from evaluations import ANSWERS, COSTS, Clock, Killed, contents, dying_writes, made_up, plan_of, questions

from asymvlm.app.loading import load
from asymvlm.app.session import InputError
from asymvlm.evaluation import record
from asymvlm.evaluation import run as running
from asymvlm.evaluation.store import Store

__all__ = ["checkpoint", "page"]  # fixtures


@pytest.fixture(scope="module")
def session(checkpoint):
    return load(str(checkpoint), device="cpu")


@pytest.fixture
def plan(session, page, monkeypatch):
    monkeypatch.setattr(running, "answer", made_up)
    for name, known in {"versions": {"torch": "2"}, "commit": None}.items():
        monkeypatch.setattr(record, name, lambda known=known: known)
    return plan_of(session, questions(page, 8))


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_killed_at_ten_random_moments_it_gives_the_same_files(plan, tmp_path, monkeypatch):
    whole = running.run(plan, tmp_path / "whole", progress=False, clock=Clock())
    written = sum((tmp_path / "whole" / name).stat().st_size for name in (ANSWERS, COSTS))
    moments = random.Random(0)
    for _ in range(10):
        with monkeypatch.context() as patched:
            patched.setattr(Store, "_append", dying_writes(moments.randrange(written // 8)))
            with pytest.raises(Killed):
                running.run(plan, tmp_path / "killed", progress=False, clock=Clock())
    mended = running.run(plan, tmp_path / "killed", progress=False, clock=Clock())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(lines(tmp_path / "killed", COSTS)) == len(plan.units) == 21
    for row, wanted in zip(mended.rows, whole.rows):
        assert {**row, "costs": None} == {**wanted, "costs": None}


@pytest.mark.parametrize("cut", [1, 40, 230])
def test_what_was_cut_short_is_answered_again(plan, tmp_path, cut):
    running.run(plan, tmp_path, progress=False, clock=Clock())
    before = contents(tmp_path)
    os.truncate(tmp_path / ANSWERS, len(before[ANSWERS]) - cut)
    running.run(plan, tmp_path, progress=False, clock=Clock())
    assert contents(tmp_path) == before
    assert len(lines(tmp_path, COSTS)) == len(plan.units)


def test_a_process_that_is_killed_outright_loses_nothing(plan, tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(0.01)
        return made_up(*arguments)

    running.run(plan, tmp_path / "whole", progress=False, clock=Clock())
    child = os.fork()
    if child == 0:
        try:
            running.answer = slow
            running.run(plan, tmp_path / "killed", progress=False, clock=Clock())
        finally:
            os._exit(1)
    answers, until = tmp_path / "killed" / ANSWERS, time.monotonic() + 60
    while not (answers.exists() and answers.stat().st_size > 2000) and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was at work"
    assert 0 < len(lines(tmp_path / "killed", COSTS)) < len(plan.units)
    running.run(plan, tmp_path / "killed", progress=False, clock=Clock())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_run_is_read_not_repeated(plan, tmp_path, monkeypatch):
    whole = running.run(plan, tmp_path, progress=False, clock=Clock())
    monkeypatch.setattr(running, "answer", None)
    assert running.run(plan, tmp_path, progress=False).summary == whole.summary


def test_another_run_is_not_mixed_in(plan, session, page, tmp_path):
    running.run(plan, tmp_path, progress=False, clock=Clock())
    before = contents(tmp_path)
    others = {
        r"settings.max_new_tokens 32 on file, 7 now": plan_of(session, questions(page, 8), max_new_tokens=7),
        r"data.samples 8 on file, 7 now; data.sha256": plan_of(session, questions(page, 7)),
        r"settings.batch_size 3 on file, 4 now": plan_of(session, questions(page, 8), batch_size=4),
    }
    for words, other in others.items():
        with pytest.raises(InputError, match=f"run.json is of another run: .*{words}"):
            running.run(other, tmp_path, progress=False)
    parameter = session.model.get_input_embeddings().weight
    parameter.data.neg_()
    try:
        with pytest.raises(InputError, match=r"model\.sha256"):
            running.run(plan, tmp_path, progress=False)
    finally:
        parameter.data.neg_()
    assert contents(tmp_path) == before


def test_foreign_lines_are_named_and_left(plan, tmp_path):
    running.run(plan, tmp_path, progress=False, clock=Clock())
    text = (tmp_path / ANSWERS).read_text().splitlines(keepends=True)
    for found, words in {
        text[0] + "nonsense\n" + "".join(text[2:]): r"answers.jsonl:2: no line of a run",
        text[0] + text[0] + "".join(text[2:]): r"answers.jsonl:2: \(0, 'full', 1.0\) found, wanted \(1, 'full', 1.0\)",
        "".join(text) + text[0]: "more lines than the run has",
    }.items():
        (tmp_path / ANSWERS).write_text(found)
        with pytest.raises(InputError, match=words):
            running.run(plan, tmp_path, progress=False)
        assert (tmp_path / ANSWERS).read_text() == found


def test_two_processes_do_not_share_a_folder(plan, tmp_path):
    with (
        Store(tmp_path, plan.units).locked(),
        pytest.raises(InputError, match="is being written by another process, wanted another folder"),
    ):
        running.run(plan, tmp_path, progress=False)


def test_a_folder_that_cannot_be_written_is_named(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory"):
        running.run(plan, tmp_path / "file" / "out", progress=False)
