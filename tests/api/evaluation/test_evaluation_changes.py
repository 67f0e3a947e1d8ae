"""What has changed between two halves of a run is told, whatever it is; and callers' own code cannot spoil a run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from checkpoint import checkpoint, page
from evaluations import ANSWERS, Clock, contents, made_up, questions
from PIL import Image

from asymvlm.app.loading import load
from asymvlm.app.session import InputError
from asymvlm.evaluation import arms, record
from asymvlm.evaluation import run as running
from asymvlm.evaluation.arms import Choices, make_arms
from asymvlm.evaluation.metrics import Metric, judged, unfit
from asymvlm.evaluation.plan import Limits, make_plan, read_samples
from asymvlm.methods import Stride

__all__ = ["checkpoint", "page"]  # fixtures

METRIC = """def score(answer, accepted):
    {}
    return float(answer == "yes")
"""


@pytest.fixture(scope="module")
def session(checkpoint):
    return load(str(checkpoint), device="cpu")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a metric of one's own, as another process would import it."""

    def write(line: str) -> str:
        (tmp_path / "own_metric.py").write_text(METRIC.format(line))
        sys.modules.pop("own_metric", None)
        return "own_metric:score"

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("own_metric", None)


@pytest.fixture
def go_on(session, page, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "answer", made_up)
    monkeypatch.setattr(record, "versions", dict)
    monkeypatch.setattr(record, "commit", lambda: None)

    def run(metric="exact"):
        choices = Choices({"random": "random"}, (0.5,))
        plan = make_plan(session, questions(page, 6), choices, Limits((metric,), batch_size=2))
        return running.run(plan, tmp_path / "out", progress=False, clock=Clock())

    return run


def test_a_metric_that_failed_is_mended_and_the_run_goes_on(own, go_on, tmp_path):
    with pytest.raises(InputError, match=r"qa.jsonl:4: metric own_metric:score failed \(ValueError: 3\)"):
        go_on(own("if 'seen' in globals(): globals()['seen'] += 1\n    else: globals()['seen'] = 0"
                  "\n    if seen == 7: raise ValueError(3)"))  # fmt: skip
    before = (tmp_path / "out" / ANSWERS).read_bytes()
    assert go_on(own("pass")).row("full")["samples"] == 6
    whole = contents(tmp_path / "out")
    assert before
    assert whole[ANSWERS].startswith(before)
    with pytest.raises(InputError, match=r"answers.jsonl:1: metric own_metric:score gave [01].0 before .* 7.0 now"):
        go_on(own("return 7.0"))
    (tmp_path / "out" / "samples.jsonl").unlink()
    go_on(own("pass"))
    assert contents(tmp_path / "out") == whole, "a file that was taken away is written again"


@pytest.mark.parametrize("name", ["config", "generation", "tokenizer"])
def test_what_the_model_is_loaded_with_is_part_of_the_record(session, go_on, monkeypatch, name):
    go_on()
    go_on()
    words = r"model.sha256"
    if name == "config":
        text = session.model.config.get_text_config()
        monkeypatch.setattr(text, "rms_norm_eps", 0.5)
    elif name == "generation":
        monkeypatch.setattr(session.model.generation_config, "repetition_penalty", 1.5)
        words = "model.generation.repetition_penalty null on file, 1.5 now"
    else:
        whole = session.processor.tokenizer.backend_tokenizer.to_str()
        backend = SimpleNamespace(to_str=lambda: whole.replace('"version":', '"other":1,"version":', 1))
        monkeypatch.setattr(type(session.processor.tokenizer), "backend_tokenizer", property(lambda self: backend))
    with pytest.raises(InputError, match=words):
        go_on()


def test_pictures_that_differ_in_their_palette_differ():
    digests = set()
    for colour, clear in [((255, 0, 0), None), ((0, 255, 0), None), ((0, 255, 0), 0)]:
        picture = Image.new("P", (4, 4))
        picture.putpalette([*colour] * 256)
        if clear is not None:
            picture.info["transparency"] = clear
        samples = read_samples([{"image": picture, "question": "What?", "answer": "x"}], None)
        digests.add(record.digest_samples(samples))
    assert len(digests) == 3


class Mine(Stride):
    def __init__(self, start: int = 0) -> None:
        super().__init__()
        object.__setattr__(self, "start", start)


class Plain:
    """No dataclass, as methods of others may be."""

    def __init__(self, reach: int) -> None:
        self.reach, self.table = reach, {}


def test_methods_of_the_callers_own_are_told_with_their_settings_and_code(session):
    def about(method):
        return make_arms(session.model, None, Choices({"mine": method}, (0.5,))).arms[1].to_dict()["about"]

    assert about(Mine()).startswith("Mine(")
    assert about(Mine()).rpartition("code ")[2] not in ("", "None")
    assert "code" not in about(Stride())
    assert arms._about(Plain(3)).startswith("Plain(reach=3), code "), "what may be printed with an address is left out"
    assert arms._about(Plain(4)) != arms._about(Plain(3))


@pytest.mark.parametrize(
    "metric,words",
    [
        (Metric("own", lambda answer, accepted: 1.0, parts=lambda answer, accepted: ("nan", 1)), "parts of metric"),
        (Metric("own", lambda answer, accepted: 1.0, parts=lambda answer, accepted: 1 / 0), "failed .ZeroDivision"),
        (Metric("own", lambda answer, accepted: 1.0, parts=lambda answer, accepted: (1, 2, 3)), "parts of metric"),
        (Metric("own", lambda answer, accepted: 1e300), "gave 1e[+]300, wanted a finite number"),
    ],
    ids=["nan", "raises", "three", "huge"],
)  # fmt: skip
def test_parts_that_cannot_be_put_together_are_named_with_their_sample(metric, words):
    with pytest.raises(InputError, match=rf"qa:3: .*{words}"):
        judged(metric, "a", ["b"], "qa:3")


def test_a_metric_gets_a_list_that_it_may_change():
    accepted = ("b", "a")
    metric = Metric("own", lambda answer, answers: float(answers.sort() is None and answers + ["c"] == ["a", "b", "c"]))
    assert judged(metric, "a", accepted, "") == 1.0
    assert accepted == ("b", "a")
    assert "its check failed (KeyError: 0)" in unfit(Metric("own", judged, check=lambda answers: {}[0]), accepted)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"limit": -1}, "limit: -1 found, wanted a whole number of at least 1"),
        ({"seed": -1}, "seed: -1 found, wanted a whole number of at least 0"),
        ({"max_new_tokens": 10**30}, "max_new_tokens: a number of 31 digits found"),
        ({"spread": "yes"}, "spread: 'yes' found, wanted Spread"),
        ({"methods": {"full": "random"}}, "methods: the name 'full' found"),
        ({"methods": {"cache:tova": "random"}, "cache": ["tova"]}, "methods: the name 'cache:tova' found"),
        ({"methods": Stride()}, r"methods: Stride\(.* found, wanted names"),
        ({"metric": 3}, "metric 3 found, wanted one of"),
        ({"samples": {"image": "a.png"}}, "samples: one record found"),
    ],
    ids=["limit", "seed", "tokens", "spread", "full", "cache", "object", "metric", "record"],
)  # fmt: skip
def test_values_that_would_be_misread_are_refused(session, page, change, words):
    given = {"samples": questions(page, 1), "methods": ["random"], "keep": 0.5, **change}
    with pytest.raises(InputError, match=words):
        running.evaluate(session.model, session.processor, progress=False, **given)
