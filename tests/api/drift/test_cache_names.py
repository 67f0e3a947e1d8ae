"""The K/V cache under either of its names: both work on every version, and a name we do not know is never read past."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from checks import GREEDY
from tiny import make_batch
from transformers import DynamicCache
from ways import BOTH, FAMILIES, FOREIGN, NATIVE, PRUNED, WAYS, assert_right, drifted, fresh, loop, right, turn

import asymvlm
from asymvlm.hf import arguments

CALLS = tuple(WAYS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", BOTH)
def test_with_one_name_known_a_call_is_right_or_an_error(family, known, monkeypatch):
    """As if the library had been written for one transformers and met another."""
    for way in CALLS:
        right(family, way)  # beforehand, with both names known
    monkeypatch.setattr(arguments, "CACHE_NAMES", (known,))
    stopped = []
    for way in CALLS:
        try:
            found = drifted(family, way)
        except (arguments.MechanismError, ValueError):
            stopped.append(way)
        else:
            assert_right(family, way, found)
    assert bool(stopped) is (known != NATIVE), stopped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BOTH)
def test_either_name_is_taken(family, name):
    """By a loop, by a later turn, by the first call of either."""
    with asymvlm.patch(fresh(family), **PRUNED) as handle:
        model = handle.model
        assert_right(family, "loop", loop(model, name))
        assert_right(family, "turn", turn(model, name))
        inputs, config = make_batch(family, "left_padded"), model.config.get_text_config()
        cache = DynamicCache(config=config)
        found = model.generate(**inputs, **{name: cache}, **GREEDY, max_new_tokens=5)
        assert_right(family, "generate", [found.sequences, torch.stack(found.logits, 1)])
        assert found[NATIVE] is cache
        assert getattr(found, NATIVE) is cache
        cache = DynamicCache(config=config)
        with torch.no_grad():
            out = model(**inputs, **{name: cache}, use_cache=True)
        assert_right(family, "forward", [out.logits])
        assert out[NATIVE] is cache
        assert getattr(out, NATIVE) is cache


@pytest.mark.parametrize("family", ["llava", "phi3_v"])
def test_two_caches_are_an_error(family):
    with asymvlm.patch(fresh(family), **PRUNED) as handle:
        model, inputs = handle.model, make_batch(family, "single")
        two = {name: DynamicCache(config=model.config.get_text_config()) for name in BOTH}
        with pytest.raises(ValueError, match="cache"):
            model.generate(**inputs, **two, max_new_tokens=2)
        with pytest.raises(ValueError, match="cache"):
            model(**inputs, **two)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_name_causes_no_warning(family, monkeypatch):
    """Neither a Python warning nor a line in transformers' log that says something is deprecated."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.WARNING)
    once = getattr(type(logger), "warning_once", None) or logging.Logger.warning_once
    once.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            for way in CALLS:
                assert_right(family, way, drifted(family, way))
    finally:
        logger.setLevel(level)
    assert not [line for line in said if "deprecated" in line]


@pytest.mark.skipif(NATIVE != "cache", reason="this transformers warns of no name of the cache")
def test_the_check_for_warnings_sees_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with pytest.raises(FutureWarning, match=FOREIGN):
            fresh("llava")(**make_batch("llava", "single"), **{FOREIGN: DynamicCache()})


@pytest.mark.parametrize("name", BOTH)
def test_a_text_step_may_give_its_ids_by_place(name):
    """The other name beside positional ids: transformers of another version would let it vanish."""
    model, ids = fresh("llava"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), asymvlm.patch(model, keep=0.5):
        whole = model(ids).logits[:, -1]
        cache = DynamicCache(config=model.config.get_text_config())
        model(ids[:, :3], **{name: cache})
        found = model(ids[:, 3:], **{name: cache}).logits[:, -1]
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
