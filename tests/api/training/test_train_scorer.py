"""train_scorer: deterministic, resumable, the same in pieces; the model and its caller notice nothing."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from model_state import changes, snapshot

import asymvlm
from asymvlm import TrainingSettings, train_scorer

FAMILIES = pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
ROWS = (tiny.ONE, tiny.LONGER, tiny.LONGEST)


def samples(family: str, count: int = 5) -> list[dict[str, torch.Tensor]]:
    return [tiny.make_inputs(family, (ROWS[i % 3],), seed=i) for i in range(count)]


def train(model, data, **options):
    return train_scorer(model, data, **{"batch_size": 2, "epochs": 2, "progress": False, **options})


@pytest.fixture
def data(family):
    return samples(family)


@FAMILIES
def test_training_lowers_the_loss_and_stays_in_bounds(model, data):
    scorer = train(model, data, epochs=12, learning_rate=0.1, temperature=0.1, validation=data)
    losses = [entry["validation"] for entry in scorer.training["evaluations"]]
    assert min(losses) < 0.95 * losses[0]
    assert float(scorer.weight.min()) >= 0
    assert float(scorer.weight.max()) <= 3
    assert scorer.budget == asymvlm.UniformBudget(0.5)
    assert scorer.gaps.samples == len(data)


@FAMILIES
def test_the_same_seed_gives_the_same_weight(model, data):
    weight = train(model, data).weight
    assert torch.equal(weight, train(model, data).weight)
    assert not torch.equal(weight, train(model, data, seed=1).weight)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_weight_is_clamped(model, data, caplog):
    with caplog.at_level(logging.WARNING):
        scorer = train(model, data, learning_rate=5.0, epochs=3)
    assert float(scorer.weight.min()) == 0
    assert float(scorer.weight.max()) == 3
    assert "sits on a clamp" in caplog.text
    assert scorer.training["clamped_share"] > 0.2


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_accumulated_pieces_equal_a_batch(model, family):
    rows = [(row,) for row in (tiny.ONE, tiny.LONGER, tiny.LONGEST)]
    alone = [tiny.make_inputs(family, row, first_image=i) for i, row in enumerate(rows)]
    together = [tiny.make_batch(family, "one_image_each")]
    pieces = train(model, alone, batch_size=3, epochs=3)
    whole = train(model, together, batch_size=1, epochs=3)
    assert torch.allclose(pieces.weight, whole.weight, atol=1e-5)
    collated = train(
        model, list(range(3)), batch_size=3, epochs=3, micro_batch_size=3, collate=lambda part: together[0]
    )
    assert torch.allclose(collated.weight, whole.weight, atol=1e-5)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("family", ["llava"], indirect=True)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(model, data, tmp_path, stop):
    def interrupt(step: int, loss: float) -> None:
        if step == stop:
            raise Interrupted

    options = {"keep_ratio": (0.3, 0.5, 0.7), "checkpoint": tmp_path, "save_every": 1}
    before = snapshot(model)
    with pytest.raises(Interrupted):
        train(model, data, on_step=interrupt, **options)
    assert not changes(before, snapshot(model))
    steps = []
    resumed = train(model, data, on_step=lambda step, loss: steps.append(step), **options)
    assert steps == list(range(stop, 7))  # the interrupted step was not saved yet
    assert resumed == train(model, data, keep_ratio=(0.3, 0.5, 0.7))


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_the_state_of_another_run_is_refused(model, data, tmp_path):
    train(model, data, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"settings.seed 0 found, 7 wanted; resume=False starts over"):
        train(model, data, checkpoint=tmp_path, seed=7)
    train(model, data, checkpoint=tmp_path, seed=7, resume=False)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_early_stop_returns_the_best_weight(model, data):
    """A learning rate that jumps from clamp to clamp gets worse: the weight before that is returned."""
    scorer = train(model, data, validation=data, learning_rate=2.0, epochs=20, patience=2)
    losses = [entry["validation"] for entry in scorer.training["evaluations"]]
    assert scorer.training["stopped_early"]
    assert len(losses) < 20
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert torch.equal(scorer.weight, train(model, data, learning_rate=2.0, epochs=best + 1).weight)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_answers_are_compared_but_never_scored_against(model, family):
    """Other answer tokens leave the scores, so the gaps, alone; as part of the prompt they would not."""
    inputs = tiny.make_inputs(family, (tiny.LONGER,))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -3:] = torch.tensor([70, 71, 72])

    def run(sample, **extra):
        return train(model, [{**sample, **extra}], learning_rate=1e-9, epochs=1)

    with_labels, changed = run(inputs, labels=labels), run(other, labels=labels)
    assert changed.gaps == with_labels.gaps
    assert changed.training["last_losses"] != with_labels.training["last_losses"]
    assert run(inputs, text_mask=labels == -100).gaps == with_labels.gaps
    assert run(other).gaps != run(inputs).gaps


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_every_epoch_sees_every_sample_in_an_order_of_its_own(model, data):
    seen: list[int] = []
    train(model, range(len(data)), epochs=3, collate=lambda part: seen.extend(part) or data[part[0]], gap_samples=0)
    epochs = [tuple(seen[start : start + 5]) for start in range(0, 15, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_rows_without_vision_do_not_count(model, family):
    pair = tiny.make_inputs(family, (tiny.ONE, tiny.TEXT_ONLY))
    alone = tiny.make_inputs(family, (tiny.ONE,))
    assert torch.allclose(train(model, [pair]).weight, train(model, [alone]).weight, atol=1e-5)
    with pytest.raises(ValueError, match="no sample of step 1 has vision tokens to prune"):
        train(model, [tiny.make_inputs(family, (tiny.TEXT_ONLY,))])


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(keep_ratio=1.0), "keep_ratio must be one ratio"),
        (dict(keep_ratio=()), "keep_ratio must be one ratio"),
        (dict(batch_size=0), "batch_size must be a whole number"),
        (dict(temperature=0), "temperature must be a positive number, got 0"),
        (dict(injection="magic"), "injection must be 'auto', 'mask' or 'bias', got 'magic'"),
        (dict(micro_batch_size=2), "micro_batch_size must be 1, or more with a collate function, got 2"),
        (dict(settings="best"), "settings must be 'default' or 'paper', got 'best'"),
        (dict(initial=torch.full((32,), float("nan"))), "initial must be finite, got 32 values that are not"),
        (dict(initial=torch.ones(3)), r"initial must have the model's width \(32,\), got \(3,\)"),
    ],
)
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_wrong_settings_are_named(plain, family, options, message):
    with pytest.raises(ValueError, match=message):
        train(plain, samples(family, 1), **options)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_no_samples_and_wrong_samples_are_named(plain):
    with pytest.raises(ValueError, match="needs samples, got none"):
        train(plain, [])
    with pytest.raises(ValueError, match="a sample must be a mapping of model inputs, got str"):
        train(plain, ["page"])
    with pytest.raises(TypeError, match="unknown setting 'speed'"):
        train(plain, ["page"], speed=1)


def test_the_paper_preset():
    paper = TrainingSettings.paper()
    assert (paper.strength, paper.temperature, paper.theta_grad) == (5, 1, False)
    assert (paper.learning_rate, paper.batch_size, paper.epochs, paper.regularization) == (1e-3, 1, 3, 1e-3)
