"""`evaluate` on a real tiny model: its answers are those of plain generation, whatever the batch."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint import KV_BYTES_PER_TOKEN, TINY, checkpoint, page
from PIL import Image

import asymvlm
from asymvlm.app.loading import load
from asymvlm.app.session import InputError
from asymvlm.evaluation import plan as planning
from asymvlm.evaluation import record
from asymvlm.evaluation.answering import count_new
from asymvlm.evaluation.arms import Choices, make_arms
from asymvlm_kernels import Spread, UniformBudget

__all__ = ["checkpoint", "page"]  # fixtures

LONGEST = 5


@pytest.fixture(scope="module")
def session(checkpoint):
    return load(str(checkpoint), device="cpu")


@pytest.fixture
def samples(page):
    whole = Image.open(page).convert("RGB")
    records = [
        {"image": str(page), "question": "What is due?", "answer": "x"},
        {"images": [whole.crop((0, 0, 80, 60)), whole.rotate(90)], "question": "Which?", "answer": ["y", "z"]},
        {"image": whole.rotate(180), "question": "Say what the page says, please.", "answer": "x", "id": "third"},
    ]
    return records


def answers_of(found):
    return {(line["sample"], line["method"], line["keep"]): line for line in found.answers}


def test_answers_are_those_of_plain_generation_in_any_batch(session, samples, tmp_path):
    methods, keep = ["asymvlm", "fastv", "random"], [1, 0.75, 0.5]
    options = {"max_new_tokens": LONGEST, "cache": ["tova"], "progress": False, "baseline": "random"}
    alone = asymvlm.evaluate(session.model, session.processor, samples, methods, keep, out=tmp_path, **options)
    together = asymvlm.evaluate(session.model, session.processor, samples, methods, keep, batch_size=3, **options)
    assert [line["answer"] for key, line in sorted(answers_of(alone).items(), key=str)] == [
        line["answer"] for key, line in sorted(answers_of(together).items(), key=str)
    ]
    found = answers_of(alone)
    assert len(found) == len(alone.answers) == 3 * (1 + 3 * 2 + 2 - 1) == 24, "fastv cannot hold one half"
    prepared = [session.prepare(sample.open(), sample.question) for sample in planning.read_samples(samples, None)]
    for number, inputs in enumerate(prepared):
        whole = session.generate(inputs, LONGEST)
        assert found[number, "full", 1.0]["answer"] == whole.text
        assert found[number, "full", 1.0]["new_tokens"] == whole.new_tokens
        with asymvlm.patch(session.model, keep=0.5) as handle:
            assert found[number, "asymvlm", 0.5]["answer"] == session.generate(inputs, LONGEST).text
            assert found[number, "asymvlm", 0.5]["kept"] == handle.last.kept[0]
            assert found[number, "asymvlm", 0.5]["gap"] == handle.last.gap[0]
    assert found[1, "full", 1.0]["vision_tokens"] == 2 * TINY.grid**2
    assert [found[number, "full", 1.0]["id"] for number in range(3)] == ["sample 0", "sample 1", "third"]
    assert alone.summary["skipped"][0]["method"] == "fastv"
    assert "in front hold all tokens" in alone.summary["skipped"][0]["reason"]
    full, half = alone.row("full"), alone.row("asymvlm", 0.5)
    assert full["kept"] == full["vision_tokens"] == 2 * half["kept"]
    assert set(half["metrics"]["exact"]) == {"value", "error", "to_full", "to_baseline"}
    columns = [inputs["input_ids"].shape[1] for inputs in prepared]
    held = sum(columns) + sum(found[number, "full", 1.0]["new_tokens"] - 1 for number in range(3))
    assert full["costs"]["kv_bytes"] == round(held * KV_BYTES_PER_TOKEN / 3)
    assert json.loads((tmp_path / "summary.json").read_text()) == alone.summary
    assert "_asymvlm" not in "".join(session.model.__dict__), "the model is as it was"


def test_the_record_tells_what_answers_depend_on(session, samples):
    found = record.versions()
    assert (found["torch"], len(found["source"])) == (torch.__version__, 16)
    digests = {record.digest_model(session)}
    digest = record.digest_samples(planning.read_samples(samples, None))
    for change in ({"question": "What else?"}, {"answer": "w"}, {"group": "a"}, {"image": Image.new("RGB", (9, 9))}):
        assert record.digest_samples(planning.read_samples([{**samples[0], **change}, *samples[1:]], None)) != digest
    session.processor.chat_template, before = session.processor.chat_template + " ", session.processor.chat_template
    digests.add(record.digest_model(session))
    session.processor.chat_template = before
    assert len(digests) == 2
    assert record.digest_model(session) in digests


def test_settings_are_what_was_asked_for(session):
    weight = torch.rand(TINY.width)
    scorer = asymvlm.Scorer(weight, asymvlm.settings.identity.identify(session.model), UniformBudget(0.3))
    choices = Choices(
        {"asymvlm": "asymvlm", "cosine": "cosine", "random": "random", "mine": asymvlm.methods.Stride()},
        (1, "own", 0.5),
        scorer=scorer,
        spread=Spread(2, 0.5),
        seed=7,
    )
    found = make_arms(session.model, session.processor, choices)
    arms = {(arm.method, arm.keep): arm for arm in found.arms}
    assert list(arms) == [
        ("full", 1.0), ("asymvlm", "own"), ("asymvlm", 0.5), ("cosine", 0.5), ("random", 0.5), ("mine", 0.5),
    ]  # fmt: skip
    assert [entry["method"] for entry in found.skipped] == ["cosine", "random", "mine"], "these bring no budget"
    assert arms["full", 1.0].vision.bypassed
    assert arms["asymvlm", "own"].vision.budget == UniformBudget(0.3)
    assert arms["asymvlm", 0.5].vision.budget == UniformBudget(0.5)
    assert torch.equal(arms["asymvlm", 0.5].vision.weight, weight)
    assert arms["cosine", 0.5].vision.weight is None
    assert arms["cosine", 0.5].vision.spread == Spread(2, 0.5)
    assert arms["random", 0.5].vision.method.seed == 7
    told = {entry: arm.to_dict()["about"] for entry, arm in arms.items()}
    assert told["asymvlm", 0.5].startswith("weight ")
    assert told["cosine", 0.5] == "cosine similarity, Spread(reach=2, share=0.5)"
    fitted = scorer.replace(calibration={"spread": {"reach": 3, "share": 0.6}})
    for spread, wanted in {None: [Spread(3, 0.6), None], True: [Spread(3, 0.6), Spread()], False: [None, None]}.items():
        choices = Choices({"asymvlm": "asymvlm"}, ("own", 0.5), scorer=fitted, spread=spread, at_least_relevant=True)
        _, *made = make_arms(session.model, session.processor, choices).arms
        assert [arm.vision.spread for arm in made] == wanted
        assert all(arm.vision.at_least_relevant for arm in made)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"keep": [0.5, 0]}, r"keep: 0 found, wanted ratios in \(0, 1\], or 'own'"),
        ({"keep": [0.5, 0.5]}, "keep: 0.5, 0.5 found, wanted each ratio once"),
        ({"methods": ["guess"]}, "methods: no method is called 'guess'"),
        ({"methods": ["fastv"], "keep": [0.1]}, "method 'fastv' cannot be measured at any ratio: keep must be in"),
        ({"cache": ["fastv"]}, "methods: no method is called 'fastv'"),
        ({"baseline": "stride"}, "baseline: 'stride' found, wanted a method that is measured: full, asymvlm"),
        ({"metric": ["exact", "exact"]}, "metric: exact, exact found, wanted each once"),
        ({"metric": "pope-f1"}, r"sample 0: metric pope-f1: answers \['x'\], wanted one, yes or no"),
        ({"batch_size": 0}, "batch_size: 0 found, wanted a whole number"),
        ({"samples": [{"image": "none.png", "question": "What?"}]}, "1 of 1 image files are missing: sample 0"),
        ({"samples": []}, "no samples, wanted one or more"),
    ],
    ids=["ratio", "twice", "method", "depth", "cache", "baseline", "metrics", "answers", "batch", "image", "none"],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_answered(session, samples, tmp_path, change, words):
    given = {"samples": samples, "methods": ["asymvlm"], "keep": [0.5], "metric": "exact", **change}
    with pytest.raises(InputError, match=words):
        asymvlm.evaluate(session.model, session.processor, out=tmp_path / "out", progress=False, **given)
    assert not (tmp_path / "out").exists()


def test_a_sample_that_a_method_cannot_serve_is_named(session, samples, tmp_path):
    with pytest.raises(InputError, match=r"sample 0: cache:snapkv 0.5: .* the limit must be at least 32"):
        asymvlm.evaluate(
            session.model, session.processor, samples, [], [0.5], cache=["snapkv"], out=tmp_path, progress=False
        )
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1, "the whole model's answer stays"


def test_a_processor_that_pads_on_the_right_is_refused(session, samples, monkeypatch):
    def padded_right(*arguments, **options):
        options["processor_kwargs"]["padding_side"] = "right"
        return template(*arguments, **options)

    template = session.processor.apply_chat_template
    monkeypatch.setattr(session.processor, "apply_chat_template", padded_right)
    with pytest.raises(
        InputError, match=r"sample 0 to sample 2: .* does not pad 3 prompts on the left .* batch size of 1"
    ):
        asymvlm.evaluate(session.model, session.processor, samples, [], [1], batch_size=3, progress=False)


def test_an_end_of_text_ends_a_row():
    tokens = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 9, 2, 0]])
    assert count_new(tokens, 2) == count_new(tokens, [2, 99]) == [2, 4, 1]
    assert count_new(tokens, None) == [4, 4, 4]


def test_bfloat16_is_answered_in_bfloat16(checkpoint, samples):
    session = load(str(checkpoint), device="cpu", dtype="bfloat16")
    found = asymvlm.evaluate(
        session.model, session.processor, samples, ["asymvlm"], [0.5], batch_size=2, max_new_tokens=3, progress=False
    )
    assert found.record["model"]["dtype"] == "bfloat16"
    assert [line["kept"] for line in found.answers if line["method"] == "asymvlm"] == [8, 16, 8]
