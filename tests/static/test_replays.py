"""A replay hands the driver what Triton's launch would, and stands back wherever Triton would do more than launch."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compiled import run

REFUSED = {"move", "move odd"}  # and gradients: what they compute by PyTorch no tape knows


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("triton")
    return json.loads(run("replays.py"))


def test_shipped_calls_are_replayed_as_launched(report):
    calls = report["shipped"]
    assert calls["wrong"] == []
    refused = {name for name, replays in calls["replays"].items() if replays == 0}
    assert {name for name in refused if "gradient" not in name} == REFUSED


def test_random_calls_are_replayed_as_launched(report):
    calls = report["drawn"]
    assert calls["wrong"] == []
    assert all(replays > 10 for replays in calls["replays"].values()), calls["replays"]


@pytest.mark.parametrize("fact", ["shape", "stride", "dtype", "alignment", "number", "shared memory"])
def test_every_fact_of_a_key_is_needed(report, fact):
    assert report[f"without {fact}"]["wrong"], f"a key without the {fact} answers as well: the check sees too little"


@pytest.fixture(scope="module")
def scenes() -> dict[str, Any]:
    pytest.importorskip("triton")
    return json.loads(run("scenes.py"))


SCENES = {
    "as it is": 1,
    "another address": 1,
    "another stream": 1,
    "no longer in inference mode": 1,
    "after a misfit": 1,
    "a listener": 0,
    "debugging": 0,
    "instrumented": 0,
    "Triton's launch replaced": 0,
    "another driver": 0,
    "another device": 0,
    "a hook of the kernel": 0,
    "a global of the kernel changed": 0,
}


@pytest.mark.parametrize("scene", SCENES)
def test_where_a_replay_stands_back(scenes, scene):
    if scene not in scenes:
        pytest.skip("this Triton does not watch the globals of a kernel")
    assert scenes[scene]["replays"] == SCENES[scene]
    assert scenes[scene]["launches"] == 2


def test_the_stream_is_that_of_the_call(scenes):
    assert scenes["another stream"]["streams"] == [7, 7]


def test_listeners_hear_of_every_launch(scenes):
    assert scenes["a listener"]["heard"] == 2


def test_threads_replay_at_once(scenes):
    assert scenes["threads"] == {"calls": 200, "wrong": 0}


def test_a_triton_that_looks_at_more_is_not_replayed(scenes):
    assert scenes["unknown names"] == {"as read": True, "one more": False}


def test_what_is_done_by_pytorch_is_never_on_tape(scenes):
    assert scenes["by PyTorch"] == {"a copy": 0, "written in place": 0, "returned": 0, "no launch": 0}
