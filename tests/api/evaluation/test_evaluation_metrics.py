"""Metrics by their published definitions, on answers whose scores are known; units that count together."""

from __future__ import annotations

import itertools

import pytest

from asymvlm.app.session import InputError
from asymvlm.evaluation.metrics import METRICS, Metric, find_metric, judged, vqa_accuracy, yes_or_no
from asymvlm.evaluation.summary import parts_of
from asymvlm.evaluation.vqa import normalised

TEN = ["red"] * 2 + ["dark red"] * 5 + ["blue"] + ["a red"] * 2  # an article is none


def longest(answer, accepted):
    """A metric of one's own."""
    return len(answer) / 10


def broken(answer, accepted):
    raise KeyError("no such page")


@pytest.mark.parametrize(
    "answer,wanted",
    [
        ("The Dark-Red, car!", "dark red car"),
        ("two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("what's up?", "what 's up"),
        ("an end. 3.5 m.", "end 3.5 m"),
        ("none", "0"),
    ],
    ids=["signs", "numbers", "contraction", "comma in a number", "is", "point", "none"],
)
def test_answers_as_the_vqa_evaluation_compares_them(answer, wanted):
    assert normalised(answer) == wanted


def test_vqa_accuracy_leaves_each_person_out_in_turn():
    def by_hand(answer):
        people = [normalised(other) for other in TEN]
        scores = []
        for left_out in range(len(people)):
            others = people[:left_out] + people[left_out + 1 :]
            scores.append(min(1, sum(other == answer for other in others) / 3))
        return sum(scores) / len(scores)

    assert vqa_accuracy("Red.", TEN) == pytest.approx(by_hand("red"))
    assert vqa_accuracy("blue", TEN) == pytest.approx(0.3) == by_hand("blue")
    assert vqa_accuracy("green", TEN) == 0


def test_yes_and_no_are_read_as_mme_reads_them():
    told = {
        "Yes.": "yes",
        "no, it is not": "no",
        "Y": "yes",
        "maybe": "other",
        "": "other",
        "A no": "no",
        "Answer: no": "other",
    }
    assert {text: yes_or_no(text) for text in told} == told


def test_f1_and_accuracy_plus_by_hand():
    truth = ["yes", "yes", "no", "no", "yes", "no"]
    found = ["Yes", "no", "yes", "No.", "perhaps", "no"]
    images = [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]
    samples = [
        {"sample": i, "answers": [answer], "images": image, "group": ""}
        for i, (answer, image) in enumerate(zip(truth, images))
    ]
    lines = [{"sample": i, "answer": answer, "scores": {}} for i, answer in enumerate(found)]
    for line in lines:
        line["scores"]["mme-plus"] = METRICS["mme-plus"].score(line["answer"], samples[line["sample"]]["answers"])
    true_positives, false_positives, false_negatives = 1, 1, 2  # "perhaps" is no yes
    f1 = 2 * true_positives / (2 * true_positives + false_positives + false_negatives)
    assert parts_of(METRICS["pope-f1"], samples, lines).value == pytest.approx(f1)
    plus = parts_of(METRICS["mme-plus"], samples, lines)
    assert plus.numerator.tolist() == [0, 0, 0]
    lines[4]["scores"]["mme-plus"] = 1.0
    assert parts_of(METRICS["mme-plus"], samples, lines).value == pytest.approx(1 / 3)
    for sample, group in zip(samples, itertools.cycle("xy")):
        sample["group"] = group
    assert len(parts_of(METRICS["mme-plus"], samples, lines).numerator) == 2, "a group of one's own comes first"


def test_metrics_of_ones_own():
    assert find_metric("anls") is METRICS["anls"]
    own = find_metric("test_evaluation_metrics:longest")
    assert judged(own, "abc", [], "here") == 0.3
    assert find_metric(longest).name == "test_evaluation_metrics:longest"
    assert find_metric(own) is own
    for name, words in {
        "f1": "metric 'f1' found, wanted one of exact, anls, relaxed, vqa, pope-f1, mme-plus, or module:function",
        "no_such_module:f": "cannot be imported .ModuleNotFoundError",
        "test_evaluation_metrics:none": "cannot be imported .AttributeError",
        "test_evaluation_metrics:TEN": "is a list, wanted a function",
    }.items():
        with pytest.raises(InputError, match=words):
            find_metric(name)


def test_a_failing_metric_is_told_with_its_sample():
    with pytest.raises(InputError, match=r"qa.jsonl:3: metric .*broken failed .KeyError: 'no such page'"):
        judged(find_metric(broken), "", [], "qa.jsonl:3")
    with pytest.raises(InputError, match="gave nan, wanted a finite number"):
        judged(Metric("odd", lambda answer, accepted: float("nan")), "", [], "here")
