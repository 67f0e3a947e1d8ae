"""Causal language models without vision: eviction equals masking, removal restores, vision settings are refused."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import tiny
import torch
from checks import GREEDY, assert_close
from evicted_reference import Masked
from limited_reference import MaskedByLimit, Seen, lowest
from model_state import changes, snapshot
from shared_models import build_once
from transformers import BartConfig, BartForCausalLM, GPT2Config, GPT2LMHeadModel

import asymvlm
from asymvlm import CacheLimit, TextEviction, TurnEviction, VisionPruning
from asymvlm.methods import H2O, TOVA
from asymvlm_kernels import UniformBudget

LIMIT, STEPS = 12, 8
EVICTION = TextEviction.paper(4, 0.5, recent=1)


@pytest.mark.parametrize("name", tiny.LANGUAGE)
def test_evicting_text_equals_masking_and_removal_restores(name):
    model, inputs = build_once(name), tiny.make_batch(name, "long_texts")
    policy = dict(threshold=5, retention=0.6, recent=2, sliding="mask" if name == "gemma3_text" else "keep")
    before, untouched = snapshot(model), model.generate(**inputs, **GREEDY, max_new_tokens=3)
    ids, logits = Masked(model, inputs, **policy).generate(16)
    with asymvlm.patch(model, text=TextEviction.paper(**policy)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=16)
    assert torch.equal(found.sequences[:, -16:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=1e-4)
    assert min(handle.last.eviction.evicted) > 0
    assert handle.last.unpruned_because == "no image in the call"
    assert not changes(before, snapshot(model))
    after = model.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert all(torch.equal(one, two) for one, two in zip(untouched.logits, after.logits))


def h2o(seen: Seen) -> list[int]:
    return lowest(seen, seen.attention.sum(1).mean(0), len(seen.held) - LIMIT, recent=LIMIT // 2)


def tova(seen: Seen) -> list[int]:
    return lowest(seen, seen.attention[:, -1].mean(0), len(seen.held) - LIMIT)


@pytest.mark.parametrize("name,method,rule", [
    ("llama", H2O(), h2o), ("gemma3_text", TOVA(), tova), ("gemma3_text", H2O(), h2o), ("phi3", TOVA(), tova),
], ids=["llama h2o", "gemma3_text tova", "gemma3_text h2o", "phi3 tova"])  # fmt: skip
def test_a_limited_cache_equals_masking(name, method, rule):
    model, inputs = copy.deepcopy(build_once(name)), tiny.make_batch(name, "long_texts")
    oracle = MaskedByLimit(build_once(name), inputs, rule, shared=method.scope == "layer")
    ids, logits = oracle.generate(STEPS)
    with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=1e-4)
    assert handle.last.eviction.cache.tokens == [LIMIT, LIMIT]


def test_windows_that_nothing_leaves_are_limited_too():
    """Layers called sliding, whose window is as wide as the model reaches, hold all tokens, and so are scored."""
    model = tiny.build("gemma3_text", sliding_window=512)
    inputs = tiny.make_batch("gemma3_text", "long_texts")
    oracle = MaskedByLimit(model, inputs, h2o)
    oracle.full = list(range(3))
    oracle.deaths = {layer: oracle.deaths[1].clone() for layer in oracle.full}
    ids, logits = oracle.generate(STEPS)
    with asymvlm.patch(model, cache=CacheLimit(H2O(), tokens=LIMIT)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=1e-4)


def test_a_model_without_groups_has_a_line_for_each_head():
    model, inputs = copy.deepcopy(build_once("opt")), tiny.make_batch("opt", "long_texts")
    with asymvlm.patch(model, cache=CacheLimit(H2O(), tokens=LIMIT)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=2).past_key_values
    assert [table.heads for table in found.tables] == [4, 4, 4]


def packed(model, linear, q8_0: int):
    """Every linear layer with its weight in GGUF blocks, a scale and 32 bytes, as transformers leaves them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.detach().unflatten(1, (-1, 32))
            scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
            rounded = (blocks / scale.float().clamp_min(1e-9)).round().to(torch.int8)
            rows = torch.cat([scale.view(torch.uint8), rounded.view(torch.uint8)], -1).flatten(1)
            layer = linear(module.in_features, module.out_features, q8_0, module.bias is not None)
            layer.weight.data, layer.bias = rows, module.bias
            model.set_submodule(name, layer)
    return model


def test_weights_packed_as_gguf_blocks(monkeypatch):
    gguf = pytest.importorskip("transformers.integrations.gguf.utils", reason="this transformers unpacks them")
    kernels = importlib.import_module("transformers.integrations.gguf.kernels")
    kernel = SimpleNamespace(mul_mat_vec=lambda weight, x, kind, out: x @ gguf.dequantize_blocks(
        weight, kind, out, x.shape[1], x.dtype
    ).T)  # fmt: skip
    monkeypatch.setattr(kernels, "_gguf_kernel", kernel)  # a hub has the real ones
    model, inputs = (
        packed(copy.deepcopy(build_once("llama")), gguf.GgufLinear, 8),
        tiny.make_batch("llama", "long_texts"),
    )
    with torch.no_grad():
        logits, before = model(**inputs).logits, build_once("llama")(**inputs).logits
    assert 0 < (logits - before)[inputs["attention_mask"] > 0].abs().max() < 0.2, "eight bits are near the weights"
    policy = dict(threshold=5, retention=0.6, recent=2)
    ids, logits = Masked(model, inputs, **policy).generate(10)
    with asymvlm.patch(model, text=TextEviction.paper(**policy)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=10)
    assert torch.equal(found.sequences[:, -10:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=1e-4)
    assert min(handle.last.eviction.evicted) > 0


def test_a_row_answers_as_alone_and_a_copy_as_the_model():
    inputs = tiny.make_batch("qwen2", "long_texts")
    with asymvlm.patch(copy.deepcopy(build_once("qwen2")), text=EVICTION) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        copied = pickle.loads(pickle.dumps(handle.model)).generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        assert torch.equal(copied.sequences, found.sequences)
        for row, one in enumerate(tiny.single_rows("qwen2", "long_texts")):
            alone = handle.model.generate(**one, **GREEDY, max_new_tokens=STEPS)
            assert torch.equal(alone.sequences[0, -STEPS:], found.sequences[row, -STEPS:])


@pytest.mark.parametrize("settings", [
    {}, {"keep": 0.5}, {"vision": VisionPruning(), "text": EVICTION}, {"strategy": "auto"}
], ids=str)  # fmt: skip
def test_vision_settings_are_refused(settings):
    model = build_once("llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is a language model, without vision to prune.*text="):
        asymvlm.patch(model, **settings)
    assert "generate" not in vars(model)


def test_other_things_that_need_vision_are_refused():
    model = copy.deepcopy(build_once("llama"))
    with pytest.raises(ValueError, match=r"turns=TurnEviction.* LlamaForCausalLM sees none"):
        asymvlm.patch(model, turns=TurnEviction(5, 0.5))
    with pytest.raises(ValueError, match="without vision to prune"):
        asymvlm.prune_inputs(model, tiny.make_batch("llama", "long_texts"))
    with asymvlm.patch(model, vision=1.0, text=EVICTION) as handle:
        with pytest.raises(ValueError, match="without vision to prune"):
            handle.vision = VisionPruning()
        handle.vision = VisionPruning(budget=UniformBudget(1.0))


@pytest.mark.parametrize("model", [
    lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)),
    lambda: BartForCausalLM(BartConfig(d_model=8, encoder_layers=1, decoder_layers=2, vocab_size=8, decoder_ffn_dim=8,
                                       decoder_attention_heads=2)),
], ids=["no list of layers", "layers of an encoder"])  # fmt: skip
def test_decoders_of_another_form_are_refused(model):
    with pytest.raises(ValueError, match=r"no adapter for .*causal language models"):
        asymvlm.patch(model(), text=EVICTION)
