"""A patch must work beside other patches, other threads and other people's hooks."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import assert_kept_logits, uniform
from evicted_reference import Masked
from masked_reference import masked_forward, masked_greedy, select
from tiny import make_batch
from windowed import windowed

import asymvlm


def test_two_patched_models_keep_their_own_settings(family, plain, model):
    inputs = make_batch(family, "single")
    other = type(plain)(plain.config).eval()
    other.load_state_dict(plain.state_dict())
    with asymvlm.patch(model, vision=uniform(0.5)) as first, asymvlm.patch(other, vision=uniform(0.25)) as second:
        model.generate(**inputs, max_new_tokens=2)
        other.generate(**inputs, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
        assert (first.last.kept, second.last.kept) == ([8], [4])


def test_two_threads_on_one_model(family, plain, model):
    batches = [make_batch(family, "single"), make_batch(family, "two_images", seed=3)]
    expected = [masked_greedy(plain, x, select(plain, x, 0.5).keep, steps=8)[0] for x in batches]

    def generate_often(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, -8:] for _ in range(5)]

    with asymvlm.patch(model, vision=uniform(0.5)), ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(generate_often, batches))
    for found, ids in zip(answers, expected, strict=True):
        assert all(torch.equal(answer, ids) for answer in found)


@pytest.mark.parametrize("where", ["", "model", "decoder"])
def test_modules_wrapped_by_accelerate(family, plain, model, where):
    hooks = pytest.importorskip("accelerate.hooks")
    module = model.get_decoder() if where == "decoder" else model.get_submodule(where)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    wrapped = vars(module)["forward"]
    inputs = make_batch(family, "left_padded")
    selection = select(plain, inputs, 0.5)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        logits = model(**inputs).logits
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, -4:]
    assert_kept_logits(logits, masked_forward(plain, inputs, selection.keep), selection)
    assert torch.equal(ids, masked_greedy(plain, inputs, selection.keep, steps=4)[0])
    assert vars(module)["forward"] is wrapped


@pytest.mark.parametrize("make", [asymvlm.TextEviction, asymvlm.TextEviction.paper], ids=["default", "paper"])
def test_two_threads_that_evict(make):
    model = copy.deepcopy(windowed("llava"))
    batches, policy = [make_batch("llava", name, seed=3) for name in ("single", "left_padded")], dict(threshold=5)

    def generate(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.generate(**inputs, do_sample=False, max_new_tokens=14)[:, -14:]

    with asymvlm.patch(model, text=make(retention=0.5, **policy)), ThreadPoolExecutor(2) as threads:
        alone = [generate(inputs) for inputs in batches]
        answers = list(threads.map(lambda inputs: [generate(inputs) for _ in range(5)], batches))
    if make != asymvlm.TextEviction:
        masked = [Masked(model, inputs, retention=0.5, **policy).generate(14)[0] for inputs in batches]
        assert all(map(torch.equal, alone, masked))
    for found, ids in zip(answers, alone, strict=True):
        assert all(torch.equal(answer, ids) for answer in found)
