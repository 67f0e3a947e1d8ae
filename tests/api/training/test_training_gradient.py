"""The gradient of the learned weight: against finite differences of a literal loss, and between the two injections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import tiny
import torch
from masked_reference import importance, merged_embeddings
from model_state import changes, snapshot
from torch import Tensor

from asymvlm.training.passes import FrozenModel, MergedBatch
from asymvlm.training.rows import check_text_rows, remembered, text_rows
from asymvlm.training.scoring import row_losses
from asymvlm.training.settings import TrainingSettings

BATCH = "left_padded"
NO_TEXT_ROWS = {"qwen3_5": "recurrent", "qwen3_5_moe": "recurrent", "lfm2_vl": "recurrent", "llama4": "chunks"}


def loss_and_grad(model, inputs, weight, settings, **options) -> tuple[float, Tensor]:
    frozen = FrozenModel(model, **options)
    weight = weight.clone().requires_grad_()
    with frozen.frozen():
        loss = row_losses(frozen, frozen.merge(inputs), weight, settings.ratios[0], settings).sum()
        (grad,) = torch.autograd.grad(loss, weight)
    return float(loss.detach()), grad


def start(model, seed: int = 3) -> Tensor:
    width = model.config.get_text_config().hidden_size
    return 1 + 0.2 * torch.randn(width, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def slope(loss: Callable[[float], float], step: float) -> float | None:
    """Central difference; None where the two sides differ: a maximum over text, or the ranking, has a kink there."""
    here, ahead, behind = loss(0), loss(step), loss(-step)
    sides = (ahead - here) / step, (here - behind) / step
    return sum(sides) / 2 if sides[0] == pytest.approx(sides[1], rel=2e-2) else None


def check_slope(
    model, loss_of: Callable[[Tensor], float], settings: TrainingSettings, inputs, step: float, begin=lambda: None
) -> None:
    """The gradient is the slope of ``loss_of`` along it. The first call on a line is at its start."""
    for seed in range(8):
        weight = start(model, seed)
        _, grad = loss_and_grad(model, inputs, weight, settings)
        direction = grad / grad.norm()
        begin()
        found = slope(lambda away: loss_of(weight + away * direction), step)  # noqa: B023  called at once
        if found is not None:
            assert found == pytest.approx(float(grad.norm()), rel=1e-2)
            return
    pytest.fail("the loss has a kink at every start")


def test_gradient_agrees_with_finite_differences(model):
    model.double()
    inputs, settings = tiny.make_batch(family_name(model), BATCH), TrainingSettings()
    # the norms compute in fp32 in any case, which bounds the step from below
    check_slope(model, lambda weight: loss_and_grad(model, inputs, weight, settings)[0], settings, inputs, 3e-4)


def test_a_detached_theta_passes_no_gradient(model):
    model.double()
    inputs, settings = tiny.make_batch(family_name(model), BATCH), TrainingSettings.paper()
    embeds = merged_embeddings(model, as_double(inputs))
    frozen = FrozenModel(model)
    thetas: list[float] = []

    def loss(weight: Tensor) -> float:
        with frozen.frozen(), torch.no_grad():
            batch = frozen.merge(inputs)
            scores = literal_scores(embeds, batch, weight)
            if not thetas:  # at the start of a line: held along it
                thetas.extend(float(row.sort().values[-max(len(row) // 2, 1)]) for row in scores)
            penalty = torch.zeros(batch.prunable.shape, dtype=torch.double)
            for b, row in enumerate(scores):
                penalty[b, batch.prunable[b]] = -5 * torch.sigmoid(thetas[b] - row)
            distance = (frozen.hidden(batch, penalty) - frozen.hidden(batch)).square().sum(-1)
        rows = batch.compared.nonzero()[:, 0]
        return sum(float(distance[rows == b].mean()) for b in range(len(thetas)))

    check_slope(model, loss, settings, inputs, 3e-4, begin=thetas.clear)


def literal_scores(embeds, batch, weight) -> list[Tensor]:
    """Eq. 1 of the prunable tokens of each row."""
    rows = zip(embeds, batch.prunable, batch.text, strict=True)
    return [importance(row, vision, text, weight)[vision] for row, vision, text in rows]


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.every_family
def test_both_injections_give_one_gradient(model):
    inputs, settings, weight = tiny.make_batch(family_name(model), BATCH), TrainingSettings(), start(model)
    loss, grad = loss_and_grad(model, inputs, weight, settings, injection="mask")
    other_loss, other = loss_and_grad(model, inputs, weight, settings, injection="bias")
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert float((other - grad).abs().max()) <= 1e-5 * max(1.0, float(grad.abs().max()))


@pytest.mark.parametrize("injection", ["mask", "bias"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
def test_a_bfloat16_decoder_gives_nearly_the_same_gradient(model, injection):
    """From the same embeddings: with others, a random model has other maxima over text."""
    inputs, settings = tiny.make_batch(family_name(model), BATCH), TrainingSettings()
    frozen = FrozenModel(model.to(torch.bfloat16), injection=injection)
    batch = frozen.merge(inputs)

    def gradient(batch: MergedBatch) -> Tensor:
        weight = start(model).float().requires_grad_()
        with frozen.frozen():
            return torch.autograd.grad(row_losses(frozen, batch, weight, 0.5, settings).sum(), weight)[0]

    rough = gradient(batch)
    model.float()
    decoder = {name: as_float(value) for name, value in batch.decoder.items()}
    exact = gradient(dataclasses.replace(batch, embeds=batch.embeds.float(), decoder=decoder))
    assert rough.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(rough, exact, dim=0)) > 0.98


def as_float(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_checkpointing_changes_nothing(model):
    inputs, settings, weight = tiny.make_batch(family_name(model), BATCH), TrainingSettings(), start(model)
    for injection in ("mask", "bias"):
        _, grad = loss_and_grad(model, inputs, weight, settings, injection=injection)
        _, other = loss_and_grad(model, inputs, weight, settings, injection=injection, checkpointing=True)
        assert torch.allclose(other, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.every_family
def test_a_bias_of_zero_is_the_model_itself(model, plain):
    """With every position compared, the pass without penalty gives the logits of an ordinary call.

    So do text rows by themselves, beside what that pass left, in the families that can run them.
    """
    inputs = tiny.make_batch(family_name(model), "single")
    wanted = plain(**inputs).logits
    for injection in ("mask", "bias"):
        frozen = FrozenModel(model, injection=injection)
        with frozen.frozen(), torch.no_grad():
            batch = frozen.merge(inputs)
            hidden, layers = remembered(frozen, batch)
            if (reason := NO_TEXT_ROWS.get(family_name(model))) is not None:
                with pytest.raises(ValueError, match=f"{reason}.*masked_rows='all'"):
                    check_text_rows(frozen, batch)
            else:
                check_text_rows(frozen, batch)
                alone = text_rows(frozen, batch, layers, torch.zeros(batch.prunable.shape))
                assert torch.allclose(alone, hidden, atol=2e-4, rtol=1e-4)
        logits = model.get_output_embeddings()(hidden)
        scale = getattr(model.config.get_text_config(), "logit_scale", None)
        logits = logits if scale is None else logits * scale
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        assert torch.allclose(logits, wanted[batch.compared], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [BATCH, "right_padded", "ends_in_image"])
def test_positions_that_are_compared(model, batch):
    """Text behind a row's last image; all text where the prompt sees itself both ways; never nothing."""
    name = family_name(model)
    if batch == "ends_in_image" and not tiny.FAMILIES[name].bare_images:
        pytest.skip("the family needs tokens around an image")
    inputs = tiny.make_batch(name, batch)
    merged = FrozenModel(model).merge(inputs)
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        real = [place for place, seen in enumerate(inputs["attention_mask"][b].tolist()) if seen]
        images = [place for place in real if ids[place] == tiny.IMAGE]
        wanted = [place for place in real if place not in images and (name == "paligemma" or place > images[-1])]
        assert merged.compared[b].nonzero()[:, 0].tolist() == (wanted or [real[-1]])
        assert merged.text[b].nonzero()[:, 0].tolist() == [place for place in real if place not in images]


def test_key_bias_attention_keeps_no_square_for_the_backward_pass(model):
    """Except where the model's own mask is more than causal: image blocks, windows."""
    name = family_name(model)
    inputs, weight = tiny.make_batch(name, BATCH), start(model).requires_grad_()
    S = inputs["input_ids"].shape[1]
    squares = {}
    for injection in ("mask", "bias"):
        found = []
        frozen = FrozenModel(model, injection=injection)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, found=found: found.append(x.shape) or x, lambda x: x)
        with frozen.frozen(), keep:
            row_losses(frozen, frozen.merge(inputs), weight, 0.5, TrainingSettings())
        squares[injection] = any(shape[-2:] == (S, S) for shape in found)
    assert squares == {"mask": True, "bias": name in ("gemma3", "paligemma")}


def test_a_row_alone_has_the_loss_it_has_in_a_batch(model):
    name = family_name(model)
    settings, weight = TrainingSettings(), start(model)
    frozen = FrozenModel(model)
    with frozen.frozen(), torch.no_grad():
        together = row_losses(frozen, frozen.merge(tiny.make_batch(name, BATCH)), weight, 0.5, settings)
        alone = [
            row_losses(frozen, frozen.merge(inputs), weight, 0.5, settings) for inputs in tiny.single_rows(name, BATCH)
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4)


def test_the_model_comes_back_as_it_was(model):
    inputs = tiny.make_batch(family_name(model), BATCH)
    model.train()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    values, before = copy.deepcopy(model.state_dict()), snapshot(model)
    loss_and_grad(model, inputs, start(model), TrainingSettings(), checkpointing=True)
    assert not changes(before, snapshot(model))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def test_a_failed_pass_leaves_no_trace(model):
    before = snapshot(model)
    frozen = FrozenModel(model, checkpointing=True)
    with pytest.raises(ValueError, match="input_ids"), frozen.frozen():
        frozen.merge({"pixel_values": torch.zeros(1)})
    assert not changes(before, snapshot(model))


def family_name(model) -> str:
    family = tiny.family_of(model)
    return next(name for name, known in tiny.FAMILIES.items() if known is family)
