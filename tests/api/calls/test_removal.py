"""Nothing may be left behind: after removal, after an error, or in the original when a copy is patched."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from checks import assert_kept_logits, uniform
from masked_reference import masked_forward, masked_generate, select
from model_state import changes, snapshot
from tiny import FAMILIES, make_batch, make_labels
from transformers.generation.streamers import BaseStreamer

import asymvlm


def use(family, model) -> list[torch.Tensor]:
    """Forward, loss and generation of a padded batch."""
    inputs = make_batch(family, "left_padded")
    with torch.no_grad():
        out = model(**inputs, labels=make_labels(inputs))
    return [out.logits, out.loss, model.generate(**inputs, do_sample=False, max_new_tokens=5)]


@pytest.mark.every_family
@pytest.mark.parametrize("how", ["remove", "context", "error in context", "unused"])
def test_removal_restores_the_model_bit_for_bit(family, plain, model, how):
    outputs, before = use(family, model), snapshot(model)
    if how == "remove":
        handle = asymvlm.patch(model, vision=uniform(0.5))
        assert changes(before, snapshot(model)), "the snapshot must see a patch"
        use(family, model)
        handle.remove()
        handle.remove()
    elif how == "context":
        with asymvlm.patch(model, vision=uniform(0.5)):
            use(family, model)
    elif how == "error in context":
        with contextlib.suppress(ZeroDivisionError), asymvlm.patch(model, vision=uniform(0.5)):
            use(family, model)
            raise ZeroDivisionError
    else:
        asymvlm.patch(model, vision=uniform(0.5)).remove()
    again = use(family, model)
    assert not changes(before, snapshot(model), ignore=frozenset())
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


@pytest.mark.parametrize("layers", ["last", "all"])
def test_removal_of_eviction_restores_the_model_bit_for_bit(family, plain, model, layers):
    outputs, before = use(family, model), snapshot(model)
    text, turns = asymvlm.TextEviction.paper(3, 0.7, layers=layers), asymvlm.TurnEviction(4, 0.5)
    with asymvlm.patch(model, vision=uniform(0.5), text=text, turns=turns):
        assert "config" in {name.rpartition(".")[2] for name in changes(before, snapshot(model))}
        use(family, model)
    again = use(family, model)
    assert not changes(before, snapshot(model), ignore=frozenset())
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


def test_an_own_generate_of_the_instance_comes_back(family, model):
    def generate(*args, **kwargs):
        return "mine"

    model.generate = generate
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert model.generate is not generate
    assert model.generate is generate


def test_patching_again_is_refused_until_removed(family, model):
    handle = asymvlm.patch(model, vision=uniform(0.5))
    with pytest.raises((ValueError, RuntimeError), match="patched"):
        asymvlm.patch(model, vision=uniform(0.25))
    handle.remove()
    with asymvlm.patch(model, vision=uniform(0.25)) as second:
        model.generate(**make_batch(family, "single"), max_new_tokens=1)
        assert second.last.kept == [4]


class Impatient(BaseStreamer):
    """Fails in the middle of decoding."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            raise InterruptedError

    def end(self) -> None:
        pass


@pytest.mark.parametrize("where", ["merge in forward", "merge in generate", "decoder", "decoding"])
def test_the_call_after_a_failed_one_is_right(family, plain, model, where):
    inputs = make_batch(family, "single")
    selection = select(plain, inputs, 0.5)
    pixels = FAMILIES[family].pixels
    too_many_pixels = {
        **inputs,
        pixels: inputs[pixels].repeat(2, *[1] * (inputs[pixels].ndim - 1)),
    }
    with asymvlm.patch(model, vision=uniform(0.5)):
        before = snapshot(model)
        if where == "merge in forward":
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                model(**too_many_pixels)
        elif where == "merge in generate":
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                model.generate(**too_many_pixels, max_new_tokens=2)
        elif where == "decoder":
            hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            with pytest.raises(ZeroDivisionError):
                model.generate(**inputs, max_new_tokens=2)
            hook.remove()
        else:
            with pytest.raises(InterruptedError):
                model.generate(**inputs, do_sample=False, max_new_tokens=6, streamer=Impatient())
        assert not changes(before, snapshot(model))
        with torch.no_grad():
            found = model(**inputs).logits
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert_kept_logits(found, masked_forward(plain, inputs, selection.keep), selection)
    assert torch.equal(ids, masked_generate(plain, inputs, selection.keep, do_sample=False, max_new_tokens=4))


def test_the_call_after_an_interrupted_one_is_right(family, plain, model):
    inputs = make_batch(family, "single")
    selection = select(plain, inputs, 0.5)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)):
        hook = model.get_decoder().layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        found = model(**inputs).logits
    assert_kept_logits(found, masked_forward(plain, inputs, selection.keep), selection)


def test_a_patched_model_is_saved_as_the_model(family, plain, model, tmp_path):
    with asymvlm.patch(model, vision=uniform(0.5)):
        assert list(model.state_dict()) == list(plain.state_dict())
        model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(use(family, loaded), use(family, plain), strict=True))


def test_a_text_only_call_after_a_failed_decoder_is_untouched(family, plain, model):
    inputs, text = make_batch(family, "single"), make_batch(family, "text_only")
    with asymvlm.patch(model, vision=uniform(0.5)), torch.no_grad():
        hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**text).logits, plain(**text).logits)


def test_a_deep_copy_lives_on_its_own(family, plain, model):
    inputs = make_batch(family, "left_padded")
    keep = select(plain, inputs, 0.5).keep
    options = dict(do_sample=False, max_new_tokens=4)
    pruned = masked_generate(plain, inputs, keep, **options)
    unpruned = plain.generate(**inputs, **options)
    handle = asymvlm.patch(model, vision=uniform(0.5))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert torch.equal(twin.generate(**inputs, **options), pruned), "the copy must use its own weights"
    assert handle.last is None, "the copy must report to its own handle"
    handle.remove()
    assert torch.equal(twin.generate(**inputs, **options), pruned), "the copy must stay patched"
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(plain.get_input_embeddings().weight)
    assert torch.equal(model.generate(**inputs, **options), unpruned)
