"""lmms-eval itself runs the plug-in on twenty drawn pages: `make test-lmms` brings it; without it this is skipped."""

from __future__ import annotations

from pathlib import Path

import drawn
import pytest
import torch
from drawn import CHECKPOINT, SCORER, Runs

import asymvlm
from asymvlm.evaluation.lmms_eval import TASKS
from asymvlm.evaluation.metrics import anls, relaxed_accuracy

pytest.importorskip("lmms_eval", reason="lmms-eval is in an environment of its own: make test-lmms")
HALF = f"method=asymvlm,scorer={SCORER},keep=0.5"
# answers at which ratios, signs, spaces, cases and empty strings could be read in two ways
WORDS = ["", " ", "no", "No ", "7", "7.0", "7.3", "7.36", "-7", "70%", "0.7", "0", "0.0", "1e1", "10"]
WORDS += ["nan", "abc", "ab c"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(drawn.write(tmp_path_factory.mktemp("drawn"), TASKS))


@pytest.fixture(autouse=True)
def judged_here(monkeypatch):
    monkeypatch.setenv("ASYMVLM_JUDGE", "drawn:judge")


def samples(runs, task, options):
    (found,) = runs.run(task, options)["samples"].values()
    return found


def test_lmms_eval_finds_the_plug_in():
    from lmms_eval.models import list_available_models

    assert "asymvlm" in list_available_models()


@pytest.mark.parametrize(
    "task, metric, ours", [("anls", "anls", anls), ("relaxed", "relaxed_overall", relaxed_accuracy)]
)
def test_its_metrics_equal_ours_on_the_answers_of_a_pruned_model(runs, task, metric, ours):
    found = samples(runs, task, HALF)
    assert len(found) == 20
    theirs = [sample[metric] for sample in found]
    assert theirs == [ours(sample["filtered_resps"][0], [sample["target"]]) for sample in found]
    assert 0 < sum(theirs) < 20
    assert runs.result(task, metric, HALF) == pytest.approx(sum(theirs) / 20, abs=1e-12)


def test_its_metrics_equal_ours_on_answers_that_are_hard_to_read():
    from lmms_eval.api.metrics import anls as their_anls
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    for answer in WORDS:
        for accepted in WORDS:
            assert their_anls([accepted], [answer])["anls"] == anls(answer, [accepted]), (answer, accepted)
            assert relaxed_correctness(answer, accepted) == relaxed_accuracy(answer, [accepted]), (answer, accepted)


def test_nothing_pruned_answers_as_the_model_under_its_own_name(runs):
    own = runs.answers("anls", "", model="llava_hf")
    assert own == runs.answers("anls", "method=full") != runs.answers("anls", "method=random,keep=0.25")


def test_pruned_answers_are_those_of_a_patch_by_hand(runs):
    from PIL import Image  # noqa: F401 the data set holds such
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    settings = asymvlm.VisionPruning(scorer=str(SCORER), budget=asymvlm.UniformBudget(0.5))
    dataset = runs.tasks.load_task_or_group(["drawn_anls"])["drawn_anls"].dataset["test"]
    answers = []
    with asymvlm.patch(model, vision=settings), torch.inference_mode():
        for row in dataset:
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=[row["image"].convert("RGB")], text=text, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert runs.answers("anls", HALF) == answers


def test_a_simple_model_is_pruned_too(runs):
    full, half = (runs.answers("anls", options, simple=True) for options in ("method=full", "method=random,keep=0.25"))
    assert full != half


def made(options):
    from asymvlm.evaluation.lmms_eval.plugin import Chat

    return Chat.create_from_arg_string(f"{drawn.WRAPPED},{options}", {"batch_size": 1, "device": None})


def first_requests(runs, number):
    task = runs.tasks.load_task_or_group(["drawn_anls"], "chat")["drawn_anls"]
    task.build_all_requests(limit=number, rank=0, world_size=1)
    return task


def test_a_failure_is_not_an_empty_answer(runs):
    model = made("method=random,keep=0.5")
    task = first_requests(runs, 2)
    model.task_dict["drawn_anls"] = task.dataset

    def refuse(*args, **kwargs):
        raise NotImplementedError("refused")

    inside = model.guard.handle.model.__dict__
    patched, inside["generate"] = inside["generate"], refuse
    with pytest.raises(NotImplementedError, match=r"^refused$"):
        model.generate_until(task.instances)
    assert inside["generate"] is refuse  # nothing is left standing
    inside["generate"] = patched
    assert len(model.generate_until(task.instances)) == 2
    assert (model.guard.calls, model.guard.held, model.guard.vision_tokens) == (2, 144, 288)
    with pytest.raises(NotImplementedError, match="wanted a task with output_type generate_until, or keep=1"):
        model.loglikelihood(task.instances)


def test_settings_that_cannot_be_served_are_told_before_anything_runs():
    for options, told in (
        ("method=fastvv,keep=0.5", "fastvv"),
        ("method=random", "brings no budget of its own"),
        ("keep=2", "keep=2 found in --model_args"),
        ("method=asymvlm,keep=0.5,nonsense=1", "nonsense"),
    ):
        with pytest.raises((ValueError, AssertionError), match=told):
            made(options)


def test_generated_tokens_are_evicted_on_request(runs):
    model, task = made("method=full,evict=paper,threshold=2,retention=0.5"), first_requests(runs, 3)
    model.task_dict["drawn_anls"] = task.dataset
    model.generate_until(task.instances)
    report = model.guard.handle.last
    assert report.kept == report.vision_tokens
    assert report.eviction.evicted[0] > 0


def test_the_covers_of_books_have_one_question_a_row(runs):
    found = samples(runs, "covers", "method=full")
    assert len(found) == 2
    assert runs.result("covers", "accuracy", "method=full") in (0.0, 0.5)


def test_a_judge_scores_free_answers_and_missing_judgements_are_counted(runs):
    assert runs.result("bench", "relative_score", HALF) == pytest.approx(75)
    assert runs.result("bench", "unjudged", HALF) == 1


def test_a_dialogue_is_asked_turn_by_turn_with_the_answers_so_far(runs):
    (answers,) = ([sample["filtered_resps"][0]] for sample in samples(runs, "dialogues", HALF))
    assert len(answers[0]) == 2
    assert runs.result("dialogues", "overall", HALF) == 7
    assert runs.result("dialogues", "unjudged", HALF) == 1


def test_without_a_judge_nothing_is_generated(runs, monkeypatch):
    from tenacity import RetryError

    monkeypatch.setenv("ASYMVLM_JUDGE", "nowhere:judge")
    with pytest.raises(RetryError) as failed:  # lmms-eval tries to load a task five times
        runs.run("bench", "method=full")
    told = str(failed.value.last_attempt.exception())
    assert told.startswith("ASYMVLM_JUDGE=nowhere:judge found, wanted module:function")


def test_the_grid_of_the_paper_is_made_of_settings_that_exist():
    import yaml
    from lmms_eval.models import list_available_models
    from lmms_eval.utils import simple_parse_args_string

    from asymvlm.evaluation.lmms_eval import PAPER
    from asymvlm.evaluation.lmms_eval.asked import split
    from asymvlm.methods import available_methods

    runs = yaml.safe_load(Path(PAPER).read_text())
    assert len(runs) == 26
    for run in runs:
        options = simple_parse_args_string(run["model_args"])
        asked, own = split(options)
        asked.text_eviction()
        assert own.pop("model") in list_available_models()
        assert asked.method.removeprefix("cache:") in {*available_methods(), "full", "cosine"}
        assert set(own) <= {"pretrained", "model_id_name"}


def test_it_prints_its_table(runs):
    from lmms_eval.utils import make_table

    assert "|drawn_anls|" in make_table(runs.run("anls", HALF))
