"""The bench on public images: what is fetched is checked, questions do not see each other, tables are the results."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from asymvlm import VisionPruning
from asymvlm.app.session import InputError
from asymvlm.methods import Spiral
from asymvlm_kernels import UniformBudget
from bench import plot
from bench.harness import registry, results
from bench.public import batches, charts, easy_vqa, packages, pictures, study, train
from bench.public.easy_vqa import VOCABULARY, Pictures, turn_of
from bench.quality.scorers import model_inputs
from bench.tinyvlm.evaluate import exact_match
from bench.tinyvlm.glyphs import BOS
from bench.tinyvlm.model import NUM_VISION, build, build_processor, to_model_pixels, vision_features

ASKED = [
    ("what is the red shape?", "circle"), ("is no red shape present?", "no"), ("is there a blue shape?", "no"),
    ("what color is the shape?", "red"), ("does the image not contain a circle?", "no"),
]  # fmt: skip


def drawn(number: int) -> np.ndarray:
    """A red square of 20 x 20 pixels on nearly white, at a place of its own."""
    image = np.full((64, 64, 3), (250, 245, 248), np.uint8)
    image[4:24, 8 + 4 * number : 28 + 4 * number] = (255, 0, 0)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in the form of the package: four training images, two of the test."""
    place = tmp_path_factory.mktemp("set")
    for split, numbers in (("train", (0, 1, 3400, 3700)), ("test", (0, 1))):
        data = place / "easy_vqa" / "data" / split
        (data / "images").mkdir(parents=True)
        questions = [[*asked, number] for number in numbers for asked in ASKED]
        (data / "questions.json").write_text(json.dumps(questions))
        for row, number in enumerate(numbers):
            Image.fromarray(drawn(row)).save(data / "images" / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> Pictures:
    return easy_vqa.pictures("train", folder)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(seed=1, vocabulary=VOCABULARY).eval()


def test_an_archive_is_unpacked_only_if_it_is_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("inside/data.txt", "here")
    asked: list[list[str]] = []

    def download(command: list[str], check: bool) -> None:
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(file.getvalue())

    monkeypatch.setattr(registry.subprocess, "run", download)
    for known in ("0" * 64, hashlib.sha256(file.getvalue()).hexdigest()):
        monkeypatch.setitem(packages.PACKAGES, "a", packages.Package("a==1", "a.whl", known, "none"))
        if known.startswith("0000"):
            with pytest.raises(ValueError, match=r"a\.whl: SHA-256 is .*, wanted 0000"):
                packages.fetch("a", tmp_path)
            assert not list(tmp_path.iterdir()), "nothing unchecked stays"
    assert (packages.fetch("a", tmp_path) / "inside" / "data.txt").read_text() == "here"
    packages.fetch("a", tmp_path)
    assert len(asked) == 2, "fetched once, and kept"
    with pytest.raises(ValueError, match="no package is called 'b'; known: easy-vqa"):
        packages.fetch("b", tmp_path)


def test_splits_are_apart_and_samples_repeat(folder: Path) -> None:
    numbers = {split: len(easy_vqa.pictures(split, folder)) for split in ("train", "validation", "calibration", "test")}
    assert numbers == {"train": 2, "validation": 1, "calibration": 1, "test": 2}
    ends = sorted(easy_vqa.PARTS.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == 4000
    assert all(one[1] == two[0] for one, two in itertools.pairwise(ends)), "no gap, no overlap"
    one, again = (easy_vqa.make_samples("test", 2, seed=3, folder=folder) for _ in range(2))
    assert torch.equal(one.text, again.text)
    assert not np.array_equal(one.pages.pixels[0], one.pages.pixels[1]), "another image each while there are any"
    only = easy_vqa.make_samples("test", 3, mix={"shape": 1.0}, folder=folder)
    assert {turn.answer for turn in only.turns} == {"circle"}


@pytest.mark.parametrize(
    "asked, told",
    [
        ([("is there not a blue shape?", "no")], (None, "blue")),
        ([("is there a blue shape?", "no"), ("is a circle present?", "yes")], ("circle", None)),
        ([("is no triangle present?", "yes")], (None, None)),
        ([("what color is the triangle?", "teal")], ("triangle", "teal")),
        (ASKED, ("circle", "red")),
    ],
    ids=["negated", "affirmed", "absent", "named", "all"],
)
def test_questions_tell_shape_and_colour(asked: list[tuple[str, str]], told: tuple[str | None, str | None]) -> None:
    assert easy_vqa.facts([turn_of(*one) for one in asked]) == told


def test_a_guess_knows_the_words_alone() -> None:
    known = [[turn_of("is there a circle?", "no"), turn_of("is there a circle?", "yes")], [turn_of("a?", "teal")]]
    known[1].append(turn_of("is there a circle?", "no"))
    asked = [turn_of("is there a circle?", "no"), turn_of("is there a circle?", "yes"), turn_of("of what?", "no")]
    assert easy_vqa.guessed(known, asked).tolist() == [True, False, False]


def test_cells_of_the_shape_are_covered_and_mean_it(found: Pictures) -> None:
    covered = easy_vqa.covered(found.pixels[:1]).reshape(12, 12)
    assert covered.any(1).nonzero()[0].tolist() == [0, 1, 2, 3, 4], "6 to 36 of 96 pixels down"
    assert covered.any(0).nonzero()[0].tolist() == [1, 2, 3, 4, 5], "12 to 42 of them across"
    batch = batches.make_batch(found, [0], 2, kept=36)
    words = [VOCABULARY[token] for token in batch.meaning[batch.shown].flatten().unique().tolist()]
    assert sorted(words) == ["circle", "red"]
    assert (batch.meaning[~batch.shown] == VOCABULARY.index("<blank>")).all()
    kept = torch.zeros_like(batch.shown).scatter(1, batch.kept, True)
    assert kept[batch.shown].all(), "the shape stays first"
    assert batch.kept.shape == (2, 36)


def test_the_processor_sees_images_and_words_as_training_does(found: Pictures) -> None:
    processor = build_processor(VOCABULARY)
    seen = processor(images=Image.fromarray(drawn(0)), text="<image>what is the red shape?", return_tensors="pt")
    assert torch.allclose(seen["pixel_values"], to_model_pixels(found.pixels[:1]), atol=1e-6)
    assert seen["input_ids"][0, NUM_VISION:].tolist() == easy_vqa.encode("what is the red shape")
    with pytest.raises(KeyError, match="purple"):
        easy_vqa.encode("is there a purple shape")


def test_the_loss_of_a_batch_is_that_of_every_question_alone(model: torch.nn.Module, found: Pictures) -> None:
    """So questions of a row neither see each other nor stand elsewhere than alone."""
    batch = batches.make_batch(found, [5], 2, kept=NUM_VISION, text=24)
    with torch.no_grad():
        loss, _, predicted = train.answer_loss(model, vision_features(model, batch.pixels), batch)
    losses, alone = [], torch.full_like(predicted, -1)
    for row in range(2):
        for number in batch.turn[row].unique().tolist():
            if number < 0:
                continue
            columns = (batch.turn[row] == number).nonzero()[:, 0]
            ids = torch.cat([torch.tensor([BOS]), torch.full((NUM_VISION,), model.config.image_token_index)])
            ids = torch.cat([ids, batch.text[row, columns]])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits[0, NUM_VISION:-1]
            alone[row, columns[1:]] = logits.argmax(-1)[1:]
            labels = batch.labels[row, columns]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    answers = batch.labels >= 0
    assert len(losses) >= 4
    assert abs(float(sum(losses) / answers.sum()) - loss.item()) < 1e-4
    assert torch.equal(alone[answers], predicted[answers])


def test_each_stage_moves_its_part_and_repeats(
    tmp_path: Path, found: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.EasyVqa, "pictures", found)
    stages = tuple(replace(stage, steps=1, batch=2) for stage in train.STAGES)
    losses = []
    for _ in range(2):
        training = train.EasyVqa(tmp_path, 0, stages)
        decoder = training.model.model.language_model.layers[0].mlp.up_proj.weight.clone()
        first = training.advance()
        assert set(first) == {"alignment"}
        assert torch.equal(decoder, training.model.model.language_model.layers[0].mlp.up_proj.weight)
        training.next_stage()
        losses.append((first["alignment"], training.advance()["answer"]))
        assert not torch.equal(decoder, training.model.model.language_model.layers[0].mlp.up_proj.weight)
    assert losses[0] == losses[1]


def test_a_study_goes_on_where_it_stopped(
    model: torch.nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = easy_vqa.make_samples("test", 2, folder=folder)
    first = study.KeptStudy(model, samples, {}, folder=tmp_path)
    spiral = [VisionPruning(method=Spiral(), budget=UniformBudget(0.11))]
    right = first.measure("spiral/0.11", spiral)
    assert torch.equal(torch.from_numpy(first.right["full"][0]), exact_match(model, samples))
    monkeypatch.setattr(study.Study, "measure", None)  # an answer that is asked for again fails
    again = study.KeptStudy(model, samples, {}, folder=tmp_path)
    assert np.array_equal(again.measure("spiral/0.11", spiral), right)
    with pytest.raises(
        InputError, match="--method: 'circle' found, wanted one of random, stride, downsample, spiral, cosine"
    ):
        study.methods(again, "cosine", ["spiral", "circle"])


def test_adaptive_budgets_are_held_against_as_many_tokens(model: torch.nn.Module, folder: Path) -> None:
    samples = easy_vqa.make_samples("test", 2, folder=folder)
    row = study.beside_uniform(study.KeptStudy(model, samples, {}), [VisionPruning(budget=UniformBudget(0.25))])
    assert row["kept"] == 0.25
    assert row["paired"] == {"difference": 0.0, "error": 0.0, "better": 0, "worse": 0, "p_value": 1.0}
    assert {kind["kept"] for kind in row["kinds"].values()} == {0.25}


def test_calibrations_of_each_budget_are_kept_apart(
    model: torch.nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[Path, set[bool]] = {}

    def calibrate(
        model: object, scorer: object, *args: object, spread: object, checkpoint: Path, **how: object
    ) -> object:
        places.setdefault(checkpoint, set()).add(spread is None)
        return SimpleNamespace(scorer=scorer, budget=UniformBudget(0.5))

    samples = easy_vqa.make_samples("test", 2, folder=folder)
    monkeypatch.setattr(study, "calibrate_budget", calibrate)
    monkeypatch.setattr(study, "make_samples", lambda split, count: samples)
    found = study.budgets(study.KeptStudy(model, samples, {}), [None], tmp_path)
    assert len(places) == 2
    assert all(len(kinds) == 1 for kinds in places.values()), "one folder holds scores of one kind"
    assert found["averages"].keys() == {"0.33", "0.22"}
    assert all(rows.keys() == study.BUDGETS.keys() for rows in found["averages"].values())


def test_generation_is_judged_by_the_words_it_writes(model: torch.nn.Module, folder: Path) -> None:
    samples = easy_vqa.make_samples("test", 2, folder=folder)
    policy = VisionPruning(budget=UniformBudget(0.5))
    said = iter([f" {samples.turns[0].answer}", "purple"])
    assert study.generated(model, samples, policy, lambda ids: next(said)).tolist() == [True, False]
    inputs = model_inputs(samples, [0], answers=False)
    assert inputs["input_ids"].shape[1] == 1 + NUM_VISION + int(samples.question[0].sum())


def test_pictures_name_what_stays_of_a_chart(tmp_path: Path) -> None:
    data = tmp_path / charts.TABLES
    data.mkdir(parents=True)
    (data / "wheat.json").write_text(json.dumps([{"year": "1565", "wheat": 41}, {"year": "1570", "wheat": 45}]))
    image = charts.wheat(tmp_path)
    assert image.size == (384, 384)
    assert (np.asarray(image) == (0, 0, 255)).all(-1).mean() > 0.2, "bars are blue"
    model, place, scorer = pictures.model_of("pages")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(place)
    figure = pictures.drawn(model, processor, scorer, image, "list all keys")
    assert "47 of 144 vision tokens kept" in figure.get_suptitle()
    assert {subject.model for subject in pictures.SUBJECTS.values()} <= pictures.TRAINED.keys()
    assert {subject.package for subject in pictures.SUBJECTS.values()} <= packages.PACKAGES.keys()


def test_the_tables_are_the_results(tmp_path: Path) -> None:
    assert plot.table("public-methods", tmp_path) == "Nothing measured yet."
    kinds = {kind: {"mean": 0.25, "error": 0.01} for kind in easy_vqa.KINDS}
    rates = {name: {"0.5": {"mean": mean, "error": 0.01, "kinds": kinds}} for name, mean in (("a", 0.5), ("b", 0.75))}
    pair = {"first": "b/0.5", "second": "a/0.5", "difference": 0.25, "error": 0.02, "p_value": 1e-9}
    run = {"command": "c", "commit": "d", "device": "e", "time": "2026-01-01T00", "torch": "f", "transformers": "g"}
    content = {
        **results.EMPTY,
        "runs": [{**run, "images": {"train": 3400}}],
        "parts": {
            "methods": {
                "run": 0, "samples": 9, "ours": "a", "rates": rates, "paired": [pair],
                "full": {"mean": 1.0, "error": 0.0, "kinds": kinds}, "guessed": {"kinds": kinds},
            }
        },
    }  # fmt: skip
    results.save(tmp_path / "public" / "easy-vqa.json", content)
    text = plot.table("public-methods", tmp_path)
    assert "| b | 0.750 ± 0.010 |" in text
    assert "| b − a | +0.250 ± 0.020 |" in text
    assert "3400 of its training images" in text
    assert text.endswith("| b | 0.250 ± 0.010 | 0.250 ± 0.010 | 0.250 ± 0.010 |")
