"""Limits of the whole cache: each method equals masking what its rule drops, in every layer, head and row.

The rules stand here a second time, over whole attention matrices.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close
from limited_reference import MaskedByLimit, Reindexed, Seen, lowest
from loops import decode, positions_of, steps
from windowed import windowed

import asymvlm
from asymvlm import CacheLimit, VisionPruning
from asymvlm.methods import (
    H2O,
    TOVA,
    DuoAttention,
    LastRow,
    OldestFirst,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    VLCache,
)
from asymvlm.methods.cached.vlcache import divided
from asymvlm_kernels import UniformBudget

LIMIT, STEPS, WINDOW = 14, 7, 4


def tova(seen: Seen) -> list[int]:
    return lowest(seen, seen.attention[:, -1].mean(0), len(seen.held) - LIMIT)


def h2o(seen: Seen) -> list[int]:
    return lowest(seen, seen.attention.sum(1).mean(0), len(seen.held) - LIMIT, recent=LIMIT // 2)


def h2o_protected(seen: Seen) -> list[int]:
    made = [column for column in seen.held if column not in seen.prompt]
    sums = seen.attention.sum(1).mean(0)
    return lowest(seen, sums, len(made) - 4, first=len(seen.prompt), recent=2)


def last_layer(seen: Seen) -> list[int]:
    return lowest(seen, seen.layers[-1][:, -1].mean(0), len(seen.held) - LIMIT, recent=1)


def oldest(seen: Seen) -> list[int]:
    return seen.held[4 : 4 + max(len(seen.held) - LIMIT, 0)]


def duo(seen: Seen) -> list[int]:
    return [] if (seen.layer + seen.head) % 2 else oldest(seen)


def snapkv(seen: Seen, limit: int = LIMIT) -> list[int]:
    if seen.moment == "step":
        return []
    sums = seen.attention[:, -WINDOW:].sum(1).mean(0)
    front = [sums[column].item() for column in seen.held[:-WINDOW]]
    padded = [0.0, 0.0, *front, 0.0, 0.0]
    scores = torch.zeros(seen.attention.shape[-1])
    for place, column in enumerate(seen.held[:-WINDOW]):
        scores[column] = sum(padded[place : place + 5]) / 5
    return lowest(seen, scores, len(seen.held) - limit, recent=WINDOW)


def pyramid(limits: list[int]):
    return lambda seen: snapkv(seen, limits[seen.layer])


def vlcache(plain, inputs):
    """Limits by the share of weights of at least a hundredth of their row's largest, one token more at a time."""
    ends = [images[-1][-1] for images in tiny.vision_columns(plain, inputs["input_ids"])]

    def rule(seen: Seen) -> list[int]:
        if seen.moment == "step":
            return []
        behind = [number for number, column in enumerate(seen.queries) if column > ends[seen.row]]
        visible = len(seen.layers[0]) * sum(number + 1 for number in behind)
        rows = [layer[:, behind] for layer in seen.layers]
        density = [int((row >= 0.01 * row.amax(-1, keepdim=True)).sum()) / visible for row in rows]
        limits = divided(LIMIT * len(rows), tuple(density), 1, len(seen.prompt))
        limit = limits[seen.layer]
        sums = seen.attention[:, behind].sum(1).mean(0)
        return lowest(seen, sums, len(seen.held) - limit, recent=max(1, limit // 10))

    return rule


RETRIEVAL = ((False, True), (True, False), (False, True))
# name -> method, rule, whether heads share a choice
CASES = {
    "tova": (TOVA(), tova, True),
    "h2o": (H2O(), h2o, False),
    "h2o_by_layer": (H2O(scope="layer"), h2o, True),
    "snapkv": (SnapKV(window=WINDOW), snapkv, False),
    "pyramidkv": (PyramidKV(window=WINDOW, beta=5), pyramid([22, 14, 6]), False),
    "duoattention": (DuoAttention(RETRIEVAL), duo, False),
    "attention": (LastRow(), last_layer, True),
    "streamingllm": (StreamingLLM(positions="original"), oldest, True),
    "vl-cache": (VLCache(), vlcache, False),
    "oldest": (OldestFirst(scope="head", sinks=4), oldest, False),
}
FAMILIES = {
    "llava": ["tova", "h2o", "snapkv", "pyramidkv", "duoattention", "streamingllm", "vl-cache"],
    "gemma3": ["tova", "h2o", "snapkv", "attention"],
    "qwen2_5_vl": ["h2o", "h2o_by_layer", "snapkv", "oldest", "vl-cache"],
    "phi3_v": ["tova", "h2o", "pyramidkv", "duoattention"],
}


def check_equals_masking(model, inputs, oracle: MaskedByLimit, limit: CacheLimit, **options):
    """Ids, logits, and what every layer and head holds in the end; returns what `generate` did, and the report."""
    ids, logits = oracle.generate(STEPS)
    with asymvlm.patch(model, cache=limit, **options) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    tables = found.past_key_values.tables
    for layer in range(len(oracle.full)):
        table = tables[layer % len(tables)]
        for number, line in enumerate(table.slot_pos):
            held = oracle.held(layer, number // table.heads, number % table.heads)
            # the last token of all is not in the cache
            assert sorted(line[line >= 0].tolist()) == [column for column in held if column < oracle.columns - 1]
    return found, handle.last.eviction


@pytest.mark.parametrize("family,name", [(family, name) for family in FAMILIES for name in FAMILIES[family]])
def test_a_limited_cache_equals_masking(family, name):
    plain, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    method, rule, shared = CASES[name]
    rule = rule(plain, inputs) if rule is vlcache else rule
    oracle = MaskedByLimit(plain, inputs, rule, shared=shared)
    _, report = check_equals_masking(copy.deepcopy(plain), inputs, oracle, CacheLimit(method, tokens=LIMIT))
    assert min(report.evicted) > 0


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "aya_vision"])
def test_sinks_move_up_to_the_window(family):
    plain, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    oracle = Reindexed(plain, inputs, oldest, sinks=4, neighbours=family == "aya_vision")
    check_equals_masking(copy.deepcopy(plain), inputs, oracle, CacheLimit(StreamingLLM(), tokens=LIMIT))
    gaps = [oracle.turned[row, oracle.columns - 1] for row in range(3)]
    evicted = [len(oracle.real(row)) - len(oracle.held(0, row, 0)) for row in range(3)]
    assert min(gaps) > 4
    assert family == "qwen2_5_vl" or gaps == evicted, "in one dimension the gap is as wide as what is gone"


def test_a_total_is_divided_by_weight():
    assert divided(30, (3.0, 2.0, 1.0), 1, 100) == [15, 10, 5]
    assert divided(30, (8.0, 1.0, 1.0), 1, 12) == [12, 9, 9]
    assert divided(30, (1.0, 1000.0, 1.0), 4, 100) == [4, 22, 4]
    assert divided(31, (1.0, 1.0, 1.0), 1, 100) == [11, 10, 10]


@pytest.mark.parametrize(
    "method", [H2O(scope="layer", recent_share=0.5), StreamingLLM()], ids=lambda method: method.name
)
def test_with_the_prompt_protected_generated_tokens_alone_go(method):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    if method.reindexes:
        oracle = Reindexed(plain, inputs, lambda seen: protected(seen, seen.queries), sinks=None)
    else:
        oracle = MaskedByLimit(plain, inputs, lambda seen: protected(seen, None), shared=True)
    limit = CacheLimit(method, tokens=4, protect_prompt=True)
    _, report = check_equals_masking(copy.deepcopy(plain), inputs, oracle, limit)
    assert report.evicted == [STEPS - 1 - 4] * 3


def protected(seen: Seen, order: list[int] | None) -> list[int]:
    """Four generated tokens stay: the newest, or two of the newest and two by the sum of attention."""
    made = [column for column in seen.held if column not in seen.prompt]
    scores = seen.attention.sum(1).mean(0) if order is None else torch.arange(seen.attention.shape[-1])
    return lowest(seen, scores, len(made) - 4, first=len(seen.prompt), recent=2 if order is None else 1)


@pytest.mark.parametrize("method", [H2O(), StreamingLLM(), SnapKV(window=4)], ids=lambda method: method.name)
def test_vision_is_pruned_beside_it(method):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    vision = VisionPruning(budget=UniformBudget(0.5))
    with asymvlm.patch(copy.deepcopy(plain), vision=vision) as handle, torch.no_grad():
        handle.model(**inputs)
    keep = torch.zeros_like(inputs["input_ids"]).bool()
    for row, columns in enumerate(handle.last.index.tolist()):
        keep[row, [column for column in columns if column >= 0]] = True
    rule = {"h2o": h2o, "snapkv": snapkv, "streamingllm": oldest}[method.name]
    if method.reindexes:
        oracle = Reindexed(plain, inputs, rule, sinks=4, keep=keep)
    else:
        oracle = MaskedByLimit(plain, inputs, rule, keep=keep)
    ids, logits = oracle.generate(STEPS)
    with asymvlm.patch(copy.deepcopy(plain), vision=vision, cache=CacheLimit(method, tokens=LIMIT)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert torch.equal(found.sequences[:, -STEPS:], ids)
    assert_close(torch.stack(found.logits, 1), logits)
    assert handle.last.eviction.cache.tokens == [LIMIT + (STEPS - 1) * (method.name == "snapkv")] * 3


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_a_later_turn_goes_on_and_is_limited_too(name):
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    method, rule, _ = CASES[name]
    oracle = MaskedByLimit(plain, inputs, rule)
    first, _ = oracle.generate(STEPS)
    question = torch.arange(18).view(3, 6) + 7
    oracle.append(question)
    oracle.prompt, oracle.moment = oracle.columns, "prompt"
    logits = oracle.forward()
    oracle.evict()
    model = copy.deepcopy(plain)
    with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)):
        before = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
        assert torch.equal(before.sequences[:, -STEPS:], first)
        ids = torch.cat([before.sequences, question], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + 6), value=1)
        given = {"past_key_values": before.past_key_values}
        after = model.generate(input_ids=ids, attention_mask=mask, **given, **GREEDY, max_new_tokens=1)
    assert_close(after.logits[0], logits)
    for layer, table in enumerate(after.past_key_values.tables):
        for number, line in enumerate(table.slot_pos):
            assert sorted(line[line >= 0].tolist()) == oracle.held(layer, number // 2, number % 2)


def test_a_loop_of_the_callers_own():
    """Single steps without `generate`, eager, with a mask of the original length."""
    plain, inputs = windowed("llava"), tiny.make_batch("llava", "left_padded")
    model = copy.deepcopy(plain)
    model.set_attn_implementation("eager")
    for name in ("h2o", "snapkv"):
        method, rule, _ = CASES[name]
        _, logits = MaskedByLimit(plain, inputs, rule).generate(4)
        with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)):
            found = steps(decode(model, inputs, positions=positions_of("llava", model, inputs)), 4)
        assert_close(found, logits)


def test_sliding_layers_may_follow():
    plain, inputs = windowed("gemma3"), tiny.make_batch("gemma3", "left_padded")
    oracle = MaskedByLimit(plain, inputs, oldest, sliding="mask")
    limit = CacheLimit(OldestFirst(sinks=4), tokens=LIMIT, sliding="mask")
    check_equals_masking(copy.deepcopy(plain), inputs, oracle, limit)
