"""The pass under the soft mask over text rows alone: what it equals, what it leaves out, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from asymvlm import TrainingSettings, train_scorer
from asymvlm.training.passes import FrozenModel
from asymvlm.training.rows import check_text_rows, remembered, text_rows
from asymvlm.training.scoring import row_losses

BATCH = "left_padded"


@pytest.mark.parametrize("injection", ["mask", "bias"])
def test_rows_of_a_padded_batch_under_a_bias(model, family, injection):
    """A bias reaches the rows of its own sample, and no others."""
    frozen = FrozenModel(model, injection=injection)
    batch = frozen.merge(tiny.make_batch(family, BATCH))
    random = torch.randn(batch.prunable.shape, generator=torch.Generator().manual_seed(1))
    bias = random.where(batch.prunable, torch.zeros(()))
    with frozen.frozen(), torch.no_grad():
        plain, layers = remembered(frozen, batch)
        alone = text_rows(frozen, batch, layers, bias)
        assert float((alone - plain).abs().max()) > 1e-3  # the bias does something
        rows = batch.compared.nonzero()[:, 0]
        for row in range(len(bias)):  # and to one row alone, the same
            only = bias * (torch.arange(len(bias)) == row)[:, None]
            found = text_rows(frozen, batch, layers, only)
            assert torch.allclose(found[rows == row], alone[rows == row], atol=2e-5)
            assert torch.allclose(found[rows != row], plain[rows != row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_decoder_of_one_layer_is_exact(model, family):
    """What vision tokens would see of the mask reaches text in the second layer only."""
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:1]
    inputs, width = tiny.make_batch(family, BATCH), model.config.get_text_config().hidden_size
    frozen, losses, gradients = FrozenModel(model), {}, {}
    with frozen.frozen():
        batch = frozen.merge(inputs)
        for rows in ("text", "all"):
            weight = torch.linspace(0.5, 1.5, width, requires_grad=True)
            losses[rows] = row_losses(frozen, batch, weight, 0.5, TrainingSettings(masked_rows=rows))
            (gradients[rows],) = torch.autograd.grad(losses[rows].sum(), weight)
    assert float(losses["all"].min()) > 1e-6
    assert torch.allclose(losses["text"], losses["all"], rtol=1e-4)
    assert float(gradients["all"].norm()) > 1e-6
    assert torch.allclose(gradients["text"], gradients["all"], atol=1e-4 * float(gradients["all"].abs().max()))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_backward_pass_keeps_no_hidden_states_of_vision_tokens(model, family):
    inputs, widths = tiny.make_batch(family, BATCH), {}
    S, D = inputs["input_ids"].shape[1], model.config.get_text_config().hidden_size
    for rows in ("text", "all"):
        weight, found = torch.ones(D, requires_grad=True), []
        frozen = FrozenModel(model)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, found=found: found.append(x.shape) or x, lambda x: x)
        with frozen.frozen():
            batch = frozen.merge(inputs)
            with keep:
                row_losses(frozen, batch, weight, 0.5, TrainingSettings(masked_rows=rows))
        hidden = [shape for shape in found if len(shape) == 3 and shape[1] == S]
        widths[rows] = len(hidden)
    assert widths["all"] > widths["text"] + 4


@pytest.mark.parametrize("family", ["llava", "qwen3_5"], indirect=True)
def test_training_refuses_before_the_first_step(model, family):
    """A family without text rows, and one whose rows are not what they should be."""
    samples = [tiny.make_inputs(family, (tiny.ONE,), seed=0)]
    if family == "qwen3_5":
        with pytest.raises(ValueError, match="recurrent layers, so text rows cannot run by themselves"):
            train_scorer(model, samples, masked_rows="text", progress=False)
        assert train_scorer(model, samples, progress=False).training["steps"] == 1
        return
    frozen = FrozenModel(model)
    with frozen.frozen():
        batch = frozen.merge(samples[0])
        with pytest.raises(
            ValueError, match=r"'llava' by themselves are .* away from the whole pass.*masked_rows='all'"
        ):
            check_text_rows(frozen, dataclasses.replace(batch, positions=batch.positions.flip(-1)))
    with pytest.raises(ValueError, match="masked_rows must be 'text' or 'all', got 'some'"):
        TrainingSettings(masked_rows="some")
    train_scorer(model, samples, masked_rows="text", gradient_checkpointing=True, progress=False)
