"""A scorer on disk is the scorer in memory; another model is refused, a transfer is asked for by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file

import asymvlm
from asymvlm import LinearBudget, Scorer, ThresholdBudget, UniformBudget, UserTurns, VisionPruning
from asymvlm.settings.identity import ModelIdentity, identify
from asymvlm.settings.scorer import CONFIG_FILE, WEIGHT_FILE, GapStatistics
from asymvlm_kernels import score_tokens

pytestmark = pytest.mark.parametrize("family", ["llava"], indirect=True)
GAPS = GapStatistics(0.2, tuple(i / 100 for i in range(21)), 5)


def scorer_of(model, budget=None) -> Scorer:
    width = model.config.get_text_config().hidden_size
    return Scorer(torch.rand(width) * 3, identify(model), budget, GAPS, {"data": "pages", "lowest": math.inf})


@pytest.mark.parametrize(
    "budget",
    [None, UniformBudget(0.4), ThresholdBudget(0.1, 0.2, 0.9, 0.5, 0.2), LinearBudget(0.5, -1.5, 0.2)],
    ids=lambda budget: type(budget).__name__,
)
def test_round_trip(plain, tmp_path, budget):
    scorer = scorer_of(plain, budget)
    scorer.save_pretrained(tmp_path)
    loaded = Scorer.from_pretrained(tmp_path)
    assert torch.equal(loaded.weight, scorer.weight)
    assert (loaded.base, loaded.budget, loaded.gaps) == (scorer.base, budget, GAPS)
    assert loaded.training == {"data": "pages", "lowest": None}  # JSON knows no infinity
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert set(record["versions"]) == {"asymvlm-kernels", "torch", "transformers"}


def test_pruning_takes_the_budget_along_unless_one_is_given(model, tmp_path):
    scorer = scorer_of(model, UniformBudget(0.25))
    scorer.save_pretrained(tmp_path)
    inputs = tiny.make_batch("llava", "single")
    for given in (scorer, tmp_path, str(tmp_path)):
        with asymvlm.patch(model, vision=VisionPruning(scorer=given)) as handle:
            model(**inputs)
            assert handle.last.kept == [4]
    with asymvlm.patch(model, vision=VisionPruning(scorer=scorer, budget=UniformBudget(0.75))) as handle:
        model(**inputs)
        assert handle.last.kept == [12]
        index = handle.last.index
    bare = asymvlm.patch(model, vision=VisionPruning(scorer=scorer.weight, budget=UniformBudget(0.75)))
    with bare as handle:
        model(**inputs)
        assert torch.equal(handle.last.index, index)
    assert VisionPruning(scorer=scorer_of(model)).budget == UniformBudget(0.5)


def test_other_text_than_in_training_is_told(plain, caplog):
    scorer = scorer_of(plain).replace(training={"text": "user"})
    VisionPruning(scorer=scorer, text=UserTurns((1,), (2,)))
    VisionPruning(scorer=scorer, text=torch.ones(1, 3, dtype=torch.bool))
    assert not caplog.records
    VisionPruning(scorer=scorer)
    assert "trained with text='user' and is used with text='all'" in caplog.text


def test_another_model_is_refused(model):
    scorer = scorer_of(model, ThresholdBudget(0.1, 0.2, 0.9, 0.5, 0.2))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.model.multi_modal_projector.parameters()).add_(0.1)
    for call in (
        lambda: asymvlm.patch(other, vision=VisionPruning(scorer=scorer)),
        lambda: asymvlm.prune_inputs(other, VisionPruning(scorer=scorer), **tiny.make_batch("llava", "single")),
    ):
        with pytest.raises(ValueError, match=r"trained for another model: .* differ .*scorer.transfer"):
            call()
    moved = scorer.transfer(other)
    assert torch.equal(moved.weight, scorer.weight)
    assert moved.budget is None  # its gaps belonged to the first model
    assert moved.gaps is None
    assert scorer.transfer(other, keep_budget=True).budget == scorer.budget
    asymvlm.patch(other, vision=VisionPruning(scorer=moved)).remove()


def test_another_width_or_family_cannot_be_transferred_either(plain):
    wrong = Scorer(torch.ones(7), ModelIdentity(7, "llava", "owner/model", "f"))
    for call in (wrong.check_model, wrong.transfer):
        with pytest.raises(ValueError, match="width 32 found, 7 wanted"):
            call(plain)
    wrong = Scorer(torch.ones(32), ModelIdentity(32, "gemma3", "owner/model", "f"))
    for call in (wrong.check_model, wrong.transfer):
        with pytest.raises(ValueError, match="model_type 'llava' found, 'gemma3' wanted"):
            call(plain)


def test_a_fine_tune_of_the_decoder_is_the_same_model(model):
    scorer = scorer_of(model)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter.add_(0.1)
    scorer.check_model(model)  # scores are computed in front of the decoder


def test_the_same_checkpoint_in_bfloat16_is_the_same_model(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    scorer = scorer_of(model)
    scorer.check_model(model.to(torch.bfloat16))


def test_a_hub_id_stands_in_where_weights_cannot_match(model):
    """Quantised weights, or another revision."""
    identity = ModelIdentity(32, "llava", "owner/model", "another fingerprint")
    model.config._name_or_path = "owner/model"
    Scorer(torch.ones(32), identity).check_model(model)
    model.config._name_or_path = "owner/fine-tune"
    with pytest.raises(ValueError, match=r"owner/fine-tune found, .* those of owner/model"):
        Scorer(torch.ones(32), identity).check_model(model)


@pytest.mark.parametrize(
    "weight,message",
    [
        (torch.ones(2, 3), r"\(D,\) floating-point tensor, got \(2, 3\)"),
        (torch.ones(3, dtype=torch.long), "torch.int64"),
        (torch.tensor([1.0, math.nan]), "must be finite, got 1 values that are not"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "must be finite, got 1 .* the first is 1e[+]300"),
        (torch.tensor([-3e38, 3e38]), "must be finite, got 2 .* the first is -3e[+]38"),
    ],
)
def test_bad_weights_are_refused(plain, weight, message):
    with pytest.raises(ValueError, match=message):
        Scorer(weight)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 3e38])
def test_a_bare_weight_is_checked_too(plain, value):
    weight = torch.ones(32)
    weight[5] = value
    with pytest.raises(ValueError, match="scorer must be finite, got 1 values that are not"):
        VisionPruning(scorer=weight)


def test_a_stored_weight_is_checked_too(plain, tmp_path):
    scorer_of(plain).save_pretrained(tmp_path)
    save_file({"weight": torch.full((32,), 1e300, dtype=torch.float64)}, tmp_path / WEIGHT_FILE)
    with pytest.raises(ValueError, match=r"not one of ours \(weight must be finite, got 32 values that are not"):
        Scorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [1e16, -1e16, 1e-40])
def test_the_largest_weight_gives_finite_scores(plain, value):
    weight = VisionPruning(scorer=torch.full((32,), value)).weight
    rows = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0)) * 1e4
    assert bool(score_tokens(rows[:, :30], rows[:, 30:], weight).isfinite().all())
    assert math.isfinite(float(weight.square().sum()))


def test_bad_folders_are_named(plain, tmp_path):
    with pytest.raises(ValueError, match="no such folder, wanted one written by save_pretrained"):
        Scorer.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="the hub does not give it"):
        Scorer.from_pretrained("nobody/nothing")  # the tests are offline
    with pytest.raises(ValueError, match=f"no {CONFIG_FILE} in it"):
        Scorer.from_pretrained(tmp_path)
    scorer_of(plain).save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    for change, message in (
        ({"format": 99}, "format 99 found, this version reads 1"),
        ({"budget": {"type": "magic"}}, "type 'magic', wanted a budget type"),
        ({"base": {"width": 5}}, "must have the width 5"),
        ({"base": {"size": 5}}, "not one of ours"),
        ({"base": [1]}, "not one of ours"),
        ({"base": record["base"] | {"width": "32"}}, "width must be a whole number of at least 1, got '32'"),
        ({"base": record["base"] | {"model_id": 5}}, "model_id must be text, got 5"),
        ({"training": ["epochs"]}, "training must be a mapping of plain values"),
        ({"gaps": {"mean": 0.1, "quantiles": [0.1], "samples": 2}}, "gaps must have 21 quantiles, got 1"),
        ({"gaps": {"mean": "a", "quantiles": [0.1] * 21, "samples": 2}}, "gaps must be finite numbers"),
        ({"gaps": {"mean": 0.1, "quantiles": [0.1] * 21, "samples": -2}}, "gaps must be of 1 sample or more"),
        ("", "config.json: the file is empty"),
        ("{", "config.json: not JSON"),
        ("[1]", "config.json: JSON list found, wanted an object such as"),
        ("[" * 100_000, "config.json: nested too deep"),
    ):
        text = change if isinstance(change, str) else json.dumps(record | change)
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(ValueError, match=message):
            Scorer.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    save_file({"w": torch.ones(3)}, tmp_path / WEIGHT_FILE)
    with pytest.raises(ValueError, match="with a 'weight'"):
        Scorer.from_pretrained(tmp_path)
    (tmp_path / WEIGHT_FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"scorer {tmp_path}: not one of ours"):
        Scorer.from_pretrained(tmp_path)
    for number in (math.inf, math.nan, 10**30):
        with pytest.raises(ValueError, match=r"is not finite|is too large"):
            Scorer._read(record | {"training": {"losses": [0.5, number]}}, {"weight": torch.ones(3)})
    with pytest.raises(ValueError, match="a path cannot hold a NUL"):
        Scorer.from_pretrained("a\0b")


def test_gap_statistics_leave_unknown_gaps_out(plain):
    found = GapStatistics.of(torch.tensor([0.1, math.nan, 0.3]))
    assert found is not None
    assert (found.samples, found.quantiles[0], found.quantiles[-1]) == (2, pytest.approx(0.1), pytest.approx(0.3))
    assert found.mean == pytest.approx(0.2)
    assert GapStatistics.of(torch.tensor([math.nan])) is None


def test_push_to_hub_uploads_the_same_files(plain, monkeypatch):
    """The hub's client is replaced: nothing leaves the machine."""
    seen = {}

    class Client:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **options):
            seen[repo_id] = {file.name for file in Path(folder_path).iterdir()}
            seen["loaded"] = Scorer.from_pretrained(folder_path)
            seen["card"] = (Path(folder_path) / "README.md").read_text()

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Client)
    base = ModelIdentity(32, "llava", "owner/base", "f")
    scorer = Scorer(torch.rand(32), base, UniformBudget(0.4), GAPS, {"data": "pages"})
    scorer.push_to_hub("owner/scorer")
    assert seen["owner/scorer"] == {CONFIG_FILE, WEIGHT_FILE, "README.md"}
    assert seen["loaded"] == scorer
    assert "base_model: owner/base" in seen["card"]
    assert "Trained on: pages" in seen["card"]
    assert "UniformBudget(ratio=0.4)" in seen["card"]
