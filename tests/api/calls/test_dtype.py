"""Half precision must rank as fp32 does on the same values, and stay half precision."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, attention_layers, uniform
from masked_reference import masked_forward, select, take
from tiny import FAMILIES, REPRESENTATIVE, build, make_batch

import asymvlm
from asymvlm import TextEviction


def half(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_selection_and_dtype(family, model, batch, dtype):
    model.to(dtype)
    inputs = half(make_batch(family, batch), dtype)
    expected = select(model, inputs, 0.5)  # scores the model's own half-precision embeddings in float64
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        out = model(**inputs)
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert torch.equal(handle.last.index, expected.index)
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()
    assert attention_layers(out.past_key_values)[0].keys.dtype == dtype
    assert torch.equal(generated[:, :-3], inputs["input_ids"])
    assert handle.last.scores.dtype == torch.float32


@pytest.mark.every_family
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_in_float64_pruning_is_masking(family, model, batch):
    """Free of the rounding that other tests have to allow for."""
    if FAMILIES[family].attention == "eager" or FAMILIES[family].recurrent == ("linear_attn",):
        pytest.skip("its layers compute in fp32 inside: the softmax of eager attention, the delta rule")
    model.to(torch.float64)
    inputs = half(make_batch(family, batch), torch.float64)
    try:
        with torch.no_grad():
            model(**inputs)
    except RuntimeError as error:
        pytest.skip(f"the unpatched model does not run in float64: {error}")
    selection = select(model, inputs, 0.5)
    expected = take(masked_forward(model, inputs, selection.keep), selection.index)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model(**inputs, use_cache=False).logits
    assert torch.equal(handle.last.index, selection.index)
    assert found.dtype == torch.float64
    real = selection.index >= 0
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)


def test_float64_models_evict_text(family, model):
    model.to(torch.float64)
    inputs = half(make_batch(family, "left_padded"), torch.float64)
    with asymvlm.patch(model, vision=uniform(0.5), text=TextEviction(6, 0.5)) as handle:
        model.generate(**inputs, max_new_tokens=10)
    assert all(handle.last.eviction.evicted)


@pytest.mark.parametrize("family", [*REPRESENTATIVE, "mistral3", "phi4_multimodal"], indirect=True)
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_eager_attention_answers_as_sdpa(family, model, batch):
    inputs, eager = make_batch(family, batch), build(family, attention="eager")
    for call in ({}, {"cache_implementation": "static"}):
        answers = []
        for one in (model, eager):
            with asymvlm.patch(one, vision=uniform(0.5)):
                answers.append(one.generate(**inputs, **GREEDY, **call, max_new_tokens=4))
        assert torch.equal(answers[0].sequences, answers[1].sequences)
        assert_close(torch.stack(answers[0].logits), torch.stack(answers[1].logits))


def test_bf16_logits_stay_near_fp32(family, plain, model):
    inputs = make_batch(family, "single")
    model.to(torch.bfloat16)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model(**half(inputs, torch.bfloat16)).logits.float()
    keep = torch.zeros_like(inputs["input_ids"]).index_fill(1, handle.last.index[0], 1).bool()
    expected = masked_forward(plain, inputs, keep)[keep]
    assert (found[0] - expected).abs().mean() < 0.05 * expected.std()
