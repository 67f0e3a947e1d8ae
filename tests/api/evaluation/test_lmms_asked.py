"""What ``--model_args`` asks of the plug-in for lmms-eval; lmms-eval itself runs it in `make test-lmms`."""

from __future__ import annotations

import pytest

import asymvlm
from asymvlm.evaluation.lmms_eval import PAPER, TASKS
from asymvlm.evaluation.lmms_eval.asked import Asked, split
from asymvlm.evaluation.lmms_eval.tasks.llava_bench import read_scores, relative_score
from asymvlm.evaluation.lmms_eval.tasks.mmdu import messages, read


def test_what_is_asked_of_the_patch_and_what_of_the_model_are_told_apart():
    options = {"pretrained": "DIR", "method": "fastv", "keep": "0.5", "device": "cpu", "seed": 3}
    assert split(options) == (Asked(method="fastv", keep=0.5, seed=3), {"pretrained": "DIR", "device": "cpu"})
    eviction = split({"method": "full", "threshold": 9, "retention": 0.5, "evict": "paper", "recent": 2})[0]
    assert eviction.text_eviction() == asymvlm.TextEviction.paper(9, 0.5, recent=2)
    assert not eviction.whole
    assert all(split(whole)[0].whole for whole in ({"method": "full"}, {"keep": 1}, {"method": "fastv", "keep": "1.0"}))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"keep": "2"}, "keep=2 found in --model_args, wanted a ratio"),
        ({"keep": True}, "keep=True found"),
        ({"spread": "perhaps"}, "spread=perhaps found in --model_args, wanted true or false"),
        ({"text": "some"}, "text=some found in --model_args, wanted all or user"),
        ({"threshold": "1.5", "retention": 0.5}, "threshold=1.5 found in --model_args, wanted a whole number"),
        ({"threshold": 9}, "threshold=9, retention=None found, wanted both or neither"),
        ({"evict": "paper"}, "without threshold and retention"),
        ({"method": "full", "keep": 0.5}, "keep=0.5 found beside method=full"),
        ({"method": "fastv", "scorer": "DIR"}, "scorer=DIR found beside method=fastv"),
        ({"method": "random", "spread": True}, "spread=true found beside method=random"),
        ({"method": "cache:h2o", "threshold": 9, "retention": 0.5}, "threshold=9 found beside method=cache:h2o"),
    ],
    ids=lambda value: "-".join(f"{name}-{given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        split(options)


def test_the_files_that_lmms_eval_reads_are_there():
    assert {file.name for file in TASKS.glob("*.yaml")} == {"llava_bench_judged.yaml", "mmdu.yaml", "ocrvqa.yaml"}
    assert PAPER.is_file()


def test_a_judge_is_read_to_the_letter():
    assert read_scores("8 6.5\nbecause of 3 things") == (8, 6.5)
    assert relative_score([(8, 6), None, (10, 9)]) == pytest.approx(100 * 15 / 18)
    assert read("the answer is good.\nOverall: 7") == 7
    for wrong in ("", "8\n6", "8 6 5", "0 6", "11 6"):
        with pytest.raises(ValueError, match="wanted two scores"):
            read_scores(wrong)
    for wrong in ("", "7", "overall: 11", "overall: 7, overall: 8"):
        with pytest.raises(ValueError, match="wanted one line"):
            read(wrong)


def test_a_dialogue_holds_the_answers_so_far_and_every_image_in_its_place():
    class Picture(str):
        def convert(self, mode):
            return self

    doc = {
        "images": [Picture("a"), Picture("b")],
        "questions": ["<ImageHere>one? <ImageHere>", "two?"],
        "answers": ["x", "y"],
    }
    first = messages(doc)
    assert [part.get("url", part.get("text")) for part in first[0]["content"]] == ["a", "one? ", "b"]
    told, over, answers, _ = messages(doc, round_idx=1, previous_output=["own"])
    assert [turn["role"] for turn in told] == ["user", "assistant", "user"]
    assert (told[1]["content"][0]["text"], over, answers) == ("own", False, ["own"])
    assert messages(doc, round_idx=2, previous_output=["own", "more"])[:2] == (None, True)
    with pytest.raises(ValueError, match="asks for more images than its dialogue has"):
        messages({**doc, "images": [Picture("a")]})
