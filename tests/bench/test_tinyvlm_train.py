"""The training of the small VLM: its forward is the model's own, losses say what they claim, a resume loses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from asymvlm.app.session import InputError
from bench.tinyvlm import train
from bench.tinyvlm.batches import Batch, make_batch
from bench.tinyvlm.glyphs import BLANK, BOS, EOS, IMAGE, VOCABULARY
from bench.tinyvlm.losses import LOOK_HEAD, LOOK_LAYER, Supervision, all_losses, decode
from bench.tinyvlm.model import NUM_VISION, build, vision_features
from bench.tinyvlm.train import STAGES, Training

SHORT = tuple(replace(stage, steps=2, batch=2) for stage in STAGES)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(seed=1).eval()


def batch(kept: int = 72) -> Batch:
    return make_batch([3], 2, (3, 12), kept)


def whole_prompt(model: torch.nn.Module, part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with all placeholders, and the same as embeddings."""
    begin, images = torch.full((2, 1), BOS), torch.full((2, NUM_VISION), IMAGE)
    embed = model.get_input_embeddings()
    rows = [embed(begin), vision_features(model, part.pixels), embed(part.text)]
    return torch.cat([begin, images, part.text], 1), torch.cat(rows, 1)


@torch.no_grad()
def test_forward_and_shown_head_are_the_models_own(model: torch.nn.Module) -> None:
    part = batch()
    ids, embeddings = whole_prompt(model, part)
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    hidden, look = decode(model, embeddings, positions)
    model.set_attn_implementation("eager")
    ones = torch.ones_like(ids)
    own = model.model(input_ids=ids, pixel_values=part.pixels, attention_mask=ones, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert (hidden - own.last_hidden_state).abs().max() < 1e-4
    assert (look - own.attentions[LOOK_LAYER][:, LOOK_HEAD]).abs().max() < 1e-5


@torch.no_grad()
def test_removing_tokens_equals_closing_their_columns(model: torch.nn.Module) -> None:
    part = batch(kept=100)
    _, embeddings = whole_prompt(model, part)
    positions = torch.arange(embeddings.shape[1]).expand(2, -1)
    kept = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    kept[:, 1 : 1 + NUM_VISION] = torch.zeros(2, NUM_VISION, dtype=torch.bool).scatter(1, part.kept, True)
    closed, _ = decode(model, embeddings, positions, kept[:, None])
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + part.kept, positions[:, 1 + NUM_VISION :]], 1)
    assert torch.equal(rows, part.positions)
    removed, _ = decode(model, embeddings.gather(1, rows[..., None].expand(-1, -1, 96)), part.positions)
    assert (closed[:, 1 + NUM_VISION :] - removed[:, 101:]).abs().max() < 1e-4


def test_batch_labels_are_the_next_tokens_and_cells_hold_them() -> None:
    part = batch(kept=NUM_VISION)
    answers = part.labels >= 0
    assert torch.equal(part.labels[answers], part.text[answers])
    pointed = part.cells >= 0
    glyphs = part.meaning[..., 0].gather(1, part.cells.clamp_min(0))
    assert torch.equal(glyphs[pointed], part.text[pointed])
    assert answers[pointed].all()
    assert (part.text == EOS).sum(1).min() >= 3, "several turns a page"
    assert (part.meaning[..., 2] < 5).sum(1).min() >= 15
    assert (part.meaning[part.meaning[..., 0] == BLANK] == torch.tensor([BLANK, BLANK, 5])).all()


def test_batch_keeps_the_entries_first() -> None:
    part = batch(kept=72)
    in_entry = part.meaning[..., 2] < 5
    kept = torch.zeros_like(in_entry).scatter(1, part.kept, True)
    assert kept[in_entry].all()
    assert (part.kept.diff(dim=1) > 0).all()


def test_losses_are_what_they_claim(model: torch.nn.Module) -> None:
    part = batch(kept=NUM_VISION)
    terms = all_losses(model, Supervision(96), part)
    ids, _ = whole_prompt(model, part)
    labels = torch.cat([torch.full((2, 1 + NUM_VISION), -100), part.labels], 1)
    with torch.no_grad():
        own = model(input_ids=ids, pixel_values=part.pixels, attention_mask=torch.ones_like(ids), labels=labels)
    assert abs(terms.answer.item() - own.loss.item()) < 1e-4
    assert torch.equal(terms.predicted, own.logits[:, NUM_VISION:-1].argmax(-1))
    assert terms.alignment.item() > F.cross_entropy(torch.zeros(1, 6), torch.tensor([0])).item() * 0.3
    assert 0 < terms.look.item() < 14  # -log of the smallest probability that counts


def run_all(folder: Path, *, stop_after: int | None = None, resume: bool = False) -> Training:
    training = Training(folder, 7, SHORT)
    if resume:
        training.restore()
    for done, _ in train.run(training):
        if done == stop_after:
            break
    return training


@pytest.mark.slow
def test_resumed_training_equals_one_that_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    monkeypatch.setattr(train, "CHECKED", 4)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = run_all(folders[0])
    for stop in (1, 2, 4, 5):  # within stages and between them
        run_all(folders[1], stop_after=stop, resume=stop > 1)
    parts = run_all(folders[1], resume=True)
    for (name, value), other in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    logs = [[json.loads(line) for line in (folder / train.LOG).read_text().splitlines()] for folder in folders]
    assert [(entry["stage"], entry["step"]) for entry in logs[0]] == [(stage.name, 2) for stage in SHORT]
    assert logs[0][-1]["exact_match"] == logs[1][-1]["exact_match"]
    assert "exact_match" not in logs[0][0], "the first stage has no answers yet"


def test_training_moves_only_what_the_first_stage_trains(tmp_path: Path) -> None:
    training = Training(tmp_path, 0, SHORT)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.advance()
    moved = {name for name, value in training.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
    assert not any("language_model.layers" in name for name in moved)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Training(tmp_path, 0, SHORT).restore()
    Training(tmp_path, 0, SHORT).save()
    with pytest.raises(InputError, match="seed 0"):
        Training(tmp_path, 1, SHORT).restore()
    with pytest.raises(InputError, match="plan"):
        Training(tmp_path, 0, STAGES).restore()


def test_seeds_differ_and_repeat_and_leave_the_random_state(model: torch.nn.Module) -> None:
    state = torch.get_rng_state()
    again, other = build(seed=1), build(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    assert len(VOCABULARY) == model.config.text_config.vocab_size
