"""Patches beside other people's wrappers, other models, threads, copies and interruptions."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import tiny
import torch
from checks import GREEDY, uniform
from tiny import make_batch

import asymvlm
from asymvlm import TextEviction, VisionPruning

SHORT = dict(do_sample=False, max_new_tokens=4)


def test_a_wrapper_on_top_of_ours_stays_and_leads_to_the_model(family, plain, model):
    inputs = make_batch(family, "single")
    wanted = plain.generate(**inputs, **SHORT)
    handle = asymvlm.patch(model, keep=0.5)
    ours, calls = model.generate, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    model.generate = theirs
    with pytest.warns(UserWarning, match="generate was replaced while the model was patched"):
        handle.remove()
    assert model.generate is theirs
    assert torch.equal(model.generate(**inputs, **SHORT), wanted)
    assert calls == [1]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_of_two_models_with_one_decoder_one_is_patched_and_the_other_left_alone(family, plain, model):
    inputs = make_batch(family, "single")
    twin = copy.deepcopy(model)
    twin.model.language_model = model.model.language_model
    wanted = plain.generate(**inputs, do_sample=False, max_new_tokens=24)
    eviction = TextEviction(threshold=4, retention=0.5)
    with asymvlm.patch(model, text=eviction) as handle:
        with pytest.raises(RuntimeError, match="part of another model that is patched"):
            asymvlm.patch(twin, text=eviction)
        assert torch.equal(twin.generate(**inputs, do_sample=False, max_new_tokens=24), wanted)
        with torch.no_grad():
            cache = asymvlm.hf.arguments.cache_of(twin(**inputs, use_cache=True))
        assert not isinstance(cache, asymvlm.EvictionCache)
        model.generate(**inputs, do_sample=False, max_new_tokens=24)
        assert sum(handle.last.eviction.evicted) > 0
    with asymvlm.patch(twin, text=eviction) as handle:
        twin.generate(**inputs, do_sample=False, max_new_tokens=24)
        assert sum(handle.last.eviction.evicted) > 0


def test_a_patched_model_that_was_not_called_yet_can_be_pickled(family):
    """Once called, transformers' own hooks on a tower are local functions, with or without a patch."""
    model, inputs = tiny.build(family), make_batch(family, "single")
    with asymvlm.patch(model, keep=0.5):
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin.generate(**inputs, **SHORT), model.generate(**inputs, **SHORT))
    handle = twin.__dict__["_asymvlm_handle"]
    assert handle.model is twin
    assert max(handle.last.kept) < max(handle.last.vision_tokens)


def test_an_interrupted_forward_keeps_nothing_alive(family):
    model, inputs = tiny.build(family), make_batch(family, "single")
    handle = asymvlm.patch(model, keep=0.5)

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = asymvlm.models.adapter_for(model).text_of(model).layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    layer.remove()
    handle.remove()
    gone = weakref.ref(model)
    del model, handle, layer
    gc.collect()
    assert gone() is None


def test_threads_with_static_caches_leave_nothing_on_the_model(family, model):
    inputs = make_batch(family, "single")
    before = set(model.__dict__)
    wanted, answers = None, []

    def run():
        answers.append(model.generate(**inputs, **SHORT, cache_implementation="static"))

    with asymvlm.patch(model, keep=0.5):
        wanted = model.generate(**inputs, **SHORT)
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 3
    assert all(torch.equal(answer, wanted) for answer in answers)
    assert set(model.__dict__) == before


def test_a_number_is_a_keep_ratio(family, model):
    inputs = make_batch(family, "single")
    reports = []
    for settings in (dict(vision=0.5), dict(keep=0.5), dict(vision=uniform(0.5))):
        with asymvlm.patch(model, **settings) as handle:
            model.generate(**inputs, **GREEDY, max_new_tokens=1)
            reports.append(handle.last.to_dict())
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(vision="half"), "vision must be VisionPruning(...) or a keep ratio such as 0.5, got 'half'"),
        (dict(vision=True), "got True"),
        (dict(keep=0.5, vision=0.5), "pass vision or keep, got both"),
        (dict(text=512), "text must be TextEviction(...) or None, got 512"),
        (dict(turns=VisionPruning()), "turns must be TurnEviction(...) or None"),
    ],
)
def test_settings_of_another_type_are_refused(settings, words):
    with pytest.raises(TypeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        asymvlm.patch(tiny.build("llava"), **settings)


def test_a_handle_prints_what_it_does(family, model):
    with asymvlm.patch(model, keep=0.5, text=TextEviction(threshold=8, retention=0.5)) as handle:
        text = str(handle)
        assert type(model).__name__ in text
        assert "UniformBudget(ratio=0.5)" in text
        assert "TextEviction(threshold=8" in text
        assert len(text) < 600
    assert "removed" in str(handle)
