"""Evicting a token must equal masking it from then on: same tokens, logits within 1e-4, in every way to decode."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, uniform
from evicted_by_line import MaskedByLine
from evicted_reference import Masked
from masked_reference import select
from windowed import ATOL, windowed

import asymvlm
from asymvlm import TextEviction

FAMILIES = ("llava", "gemma3", "phi3_v", "qwen2_5_vl")
STATIC = {"cache_implementation": "static"}


def check(family, policy: dict, steps: int, batch="left_padded", vision=None, **options):
    """Generate ``steps`` tokens both ways; the patched result and the reference."""
    model = windowed(family)
    inputs = tiny.make_batch(family, batch)
    keep = None if vision is None else select(model, inputs, vision).keep
    reference = Masked(model, inputs, keep, **policy)
    ids, logits = reference.generate(steps)
    pruning = {} if vision is None else {"vision": uniform(vision)}
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction.paper(**policy), **pruning) as handle:
        found = handle.model.generate(**inputs, **GREEDY, **options, max_new_tokens=steps)
    assert torch.equal(found.sequences[:, -steps:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
    report = handle.last.eviction
    assert report.evicted == [len(row) for row in reference.evicted]
    distinct = len({tuple(row) for row in reference.evicted})
    assert distinct > 1 or len(ids) == 1, "rows must evict different tokens, or nothing is shown"
    held = len(reference.generated) - len(reference.evicted[0])
    assert report.cache.held == [held] * len(ids)
    return found, reference


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_thirty_two_evictions_in_forty_steps(family, cache):
    check(family, dict(threshold=7, retention=1.0), steps=40, **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_bulk_evictions_with_pruning_at_a_half(family, cache):
    check(family, dict(threshold=9, retention=0.5), steps=24, batch="one_image_each", vision=0.5, **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("sliding", ["keep", "mask"])
@pytest.mark.parametrize("vision", [None, 0.5], ids=["whole", "pruned"])
def test_sliding_layers_keep_or_lose_evicted_tokens(cache, sliding, vision):
    policy = dict(threshold=6, retention=0.5, sliding=sliding)
    check("gemma3", policy, steps=24, vision=vision, batch="one_image_each", **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("vision", [None, 0.5], ids=["whole", "pruned"])
def test_sliding_layers_lose_tokens_where_nothing_is_padded(cache, vision):
    """transformers then makes no mask at all, until one is needed."""
    check("gemma3", dict(threshold=6, retention=0.5, sliding="mask"), 20, batch="single", vision=vision, **cache)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("policy", [
    dict(threshold=6, retention=0.5, mode="proportional"),
    dict(threshold=8, retention=0.75, recent=5),
    dict(threshold=6, retention=0.5, layers="all"),
    dict(threshold=2, retention=0.5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_modes(family, policy, cache):
    check(family, policy, steps=20, **cache)


@pytest.mark.parametrize("attention", ["eager"])
@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_eager_attention(family, attention, cache):
    model, policy, inputs = windowed(family), dict(threshold=6, retention=0.5), tiny.make_batch(family, "left_padded")
    ids, logits = Masked(model, inputs, **policy).generate(16)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation(attention)
    with asymvlm.patch(eager, text=TextEviction.paper(**policy)):
        found = eager.generate(**inputs, **GREEDY, **cache, max_new_tokens=16)
    assert torch.equal(found.sequences[:, -16:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)


@pytest.mark.every_family
def test_every_family_beside_pruning(family, plain, model):
    inputs, policy = tiny.make_batch(family, "left_padded"), dict(threshold=4, retention=0.5)
    if family == "llama4":
        with pytest.raises(NotImplementedError, match="does not know the 'chunked_attention'"):
            asymvlm.patch(model, text=TextEviction(**policy))
        hooks = [module._forward_pre_hooks for module in (model, model.language_model.model)]
        assert not any(hooks), "a refused patch leaves nothing behind"
        return
    keep = select(plain, inputs, 0.5).keep
    # a recurrent layer's state keeps what an evicted token wrote to it, and never saw a pruned one
    pruned = not tiny.FAMILIES[family].recurrent
    oracle = MaskedByLine(plain, inputs, keep if pruned else None, scope="layer", adds_up=True, **policy)
    ids, logits = oracle.generate(10)
    vision = {"vision": uniform(0.5)} if pruned else {}
    with asymvlm.patch(model, text=TextEviction(**policy), **vision) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=10)
    assert torch.equal(found.sequences[:, -10:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
    assert handle.last.eviction.cache.held == [3] * len(ids)


def turns(family, inputs, policy, options, vision=None, answer=9):
    """Two turns and a third, patched and masked, each with the tokens that the decoder was fed."""
    model = windowed(family)
    keep = None if vision is None else select(model, inputs, vision).keep
    reference = Masked(model, inputs, keep, **policy)
    patched, fed = copy.deepcopy(model), []
    pruning = {} if vision is None else {"vision": uniform(vision)}
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    with asymvlm.patch(patched, text=TextEviction.paper(**policy), **pruning) as handle:
        patched.get_decoder().layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        sent, cache = dict(inputs), {}
        for turn in range(3):
            ids, logits = reference.generate(answer)
            found = patched.generate(**sent, **cache, **options, **GREEDY, max_new_tokens=answer)
            yield found, ids, logits, handle, reference, fed
            fed.clear()
            question = torch.randint(20, 60, (len(ids), 5), generator=torch.Generator().manual_seed(turn))
            reference.append(question)
            sent = {name: reference.inputs[name] for name in names if name in inputs}
            cache, options = {"past_key_values": found.past_key_values}, {}


@pytest.mark.parametrize("family,vision", [
    ("llava", None), ("gemma3", 0.5), ("gemma3", None), ("phi3_v", None), ("qwen2_5_vl", 0.5),
], indirect=["family"])  # fmt: skip
def test_later_turns_on_a_cache_with_evicted_tokens(family, vision):
    """Trap: `generate` cuts the conversation by the cache's length; a physical one would feed old tokens again."""
    inputs, policy = tiny.make_batch(family, "left_padded"), dict(threshold=6, retention=0.5, sliding="mask")
    for turn, (found, ids, logits, handle, reference, fed) in enumerate(turns(family, inputs, policy, {}, vision)):
        assert torch.equal(found.sequences[:, -9:], ids)
        assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
        if turn:
            assert fed[0] == 6, "five tokens of a question and the last of the answer, which nobody fed yet"
        assert handle.last.eviction.cache.evicted == [len(row) for row in reference.evicted]


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
def test_later_turns_on_a_static_cache(family):
    inputs, policy = tiny.make_batch(family, "left_padded"), dict(threshold=6, retention=0.5)
    cache = asymvlm.EvictionCache(windowed(family).config, capacity=120, static=True)
    options = {"past_key_values": cache}
    for found, ids, logits, *_ in turns(family, inputs, policy, options):
        assert found.past_key_values is cache
        assert torch.equal(found.sequences[:, -9:], ids)
        assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)


@pytest.mark.parametrize("family,static", [("llava", False), ("gemma3", False), ("llava", True)])
def test_tokens_that_a_later_turn_masks(family, static):
    """Rows of a batch that stopped early were padded by `generate`; the next turn's mask says so."""
    model, policy = windowed(family), dict(threshold=6, retention=0.5)
    inputs = tiny.make_batch(family, "left_padded")
    cache = {"past_key_values": asymvlm.EvictionCache(model.config, capacity=90, static=True)} if static else {}
    reference = Masked(model, inputs, **policy)
    with asymvlm.patch(copy.deepcopy(model), text=TextEviction.paper(**policy)) as handle:
        first = handle.model.generate(**inputs, **cache, **GREEDY, max_new_tokens=5)
        reference.generate(5)
        question = torch.tensor([[21, 22, 23]] * 3)
        reference.append(question)
        mask = reference.inputs["attention_mask"]
        mask[1, -6:-3] = 0  # row 1 had only two tokens of an answer
        reference.position_ids = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts
        ids, logits = reference.generate(10)
        found = handle.model.generate(
            input_ids=reference.inputs["input_ids"][:, :-10], attention_mask=mask,
            past_key_values=first.past_key_values, **GREEDY, max_new_tokens=10,
        )  # fmt: skip
    assert torch.equal(found.sequences[:, -10:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_sliding_last_layer_does_not_score(layers):
    """A token outside its window would score exactly 0."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny.build("gemma3", sliding_window=12, layer_types=kinds[::-1])
    inputs, policy = tiny.make_batch("gemma3", "one_image_each"), dict(threshold=8, retention=0.5, layers=layers)
    ids, logits = Masked(model, inputs, **policy).generate(20)
    with asymvlm.patch(model, text=TextEviction.paper(**policy)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=20)
    assert torch.equal(found.sequences[:, -20:], ids)
    assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype,atol", [(torch.bfloat16, 0.25), (torch.float16, 0.04)], ids=str)
def test_half_precision_on_the_same_tokens(dtype, atol, cache):
    """Another order of slots is another order of sums, so answers may part: the tokens are forced."""
    model = copy.deepcopy(windowed("gemma3")).to(dtype)
    inputs = tiny.make_batch("gemma3", "one_image_each")
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with asymvlm.patch(model, text=TextEviction.paper(5, 0.5)) as handle:
        found = model.generate(**inputs, **GREEDY, **cache, max_new_tokens=14)
    assert handle.last.eviction.evicted == [8, 8, 8]
    reference = Masked(model, inputs, threshold=5, retention=0.5)
    _, logits = reference.generate(14, forced=found.sequences[:, -14:])
    assert_close(torch.stack(found.logits, 1).float(), logits.float(), atol=atol)
