"""The cache by itself: what may leave it, what it holds, and that its memory stays where and what it was."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import torch
from checks import GREEDY
from hypothesis import given, settings
from hypothesis import strategies as st
from windowed import windowed

import asymvlm
import asymvlm.cache.growing as slots
import asymvlm.hf.attention as capture
from asymvlm import EvictionCache, TextEviction, TurnEviction
from asymvlm.cache.choose import lowest
from asymvlm.hf.arguments import cache_in
from asymvlm.methods import H2O, LastRow

SCORES = st.sampled_from([0.0, -0.0, 0.25, 0.5, float("nan"), float("inf")])


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_only_candidates_go_lowest_first_and_oldest_among_equal(data):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    draw = lambda strategy: [data.draw(st.lists(strategy, min_size=width, max_size=width)) for _ in range(rows)]  # noqa: E731
    scores, candidates = torch.tensor(draw(SCORES)), torch.tensor(draw(st.booleans()))
    columns = torch.stack([torch.randperm(width) for _ in range(rows)]).int()
    count = torch.tensor([data.draw(st.integers(0, width)) for _ in range(rows)])
    chosen = lowest(scores, candidates, columns, count)
    assert not (chosen & ~candidates).any()
    for b in range(rows):
        order = [i for i in range(width) if candidates[b, i]]
        order.sort(key=lambda i: (not scores[b, i].isnan(), scores[b, i].nan_to_num(0).item(), columns[b, i].item()))
        assert chosen[b].nonzero()[:, 0].tolist() == sorted(order[: int(count[b])])


class Tokens:
    """Drives a cache with K and V that tell their column and row, as a model would."""

    def __init__(self, cache: EvictionCache, rows: int) -> None:
        self.cache, self.rows, self.column = cache, rows, 0

    def feed(self, count: int) -> None:
        values = torch.arange(self.column, self.column + count).float()
        values = values[None, None, :, None] + 1000 * torch.arange(self.rows)[:, None, None, None]
        for layer in range(len(self.cache.layers)):
            self.cache.update(values.expand(-1, 2, -1, 4), -values.expand(-1, 2, -1, 4), layer)
        self.column += count

    def held(self, row: int) -> list[int]:
        """Columns that the first layer holds, read off K, after all layers and V were found to agree."""
        table, layers = self.cache.table, self.cache.layers
        used = table.slot_pos[row] >= 0
        found = layers[0].keys[row, :, used]
        for layer in layers:
            assert torch.equal(layer.keys[row, :, used], found)
            assert torch.equal(layer.values[row, :, used], -found)
        assert (found == found[:1, :, :1]).all()
        columns = (found[0, :, 0] - 1000 * row).long().tolist()
        assert columns == table.slot_pos[row, used].tolist()
        return sorted(columns)


@settings(deadline=None, max_examples=25)
@given(st.data())
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_prompt_and_newest_token_stay_whatever_the_scores(static, data):
    policy = TextEviction.paper(
        threshold=data.draw(st.integers(2, 6)), retention=data.draw(st.sampled_from([0.5, 0.75, 1.0])),
        mode=data.draw(st.sampled_from(["hysteresis", "proportional"])),
    )  # fmt: skip
    prompt, rows, kind = 5, 2, data.draw(st.sampled_from(["nan", "equal", "drawn"]))
    cache = EvictionCache(windowed("llava").config, capacity=64 if static else None, static=static)
    tokens = Tokens(cache, rows)
    tokens.feed(prompt)
    for generated in range(1, 1 + data.draw(st.integers(1, 18))):
        tokens.feed(1)
        width = cache.table.capacity if static else cache.table.span
        scores = torch.full((rows, width), float("nan") if kind == "nan" else 0.125)
        if kind == "drawn":
            scores = torch.tensor([[data.draw(SCORES) for _ in range(width)] for _ in range(rows)])
        if static or any(cache.table.excess(policy)):
            cache.table.evict(scores, policy)
        for row in range(rows):
            held = tokens.held(row)
            assert held[:prompt] == list(range(prompt))
            assert held[-1] == tokens.column - 1
            if policy.mode == "hysteresis":
                assert len(held) - prompt <= policy.threshold
            elif generated > policy.threshold:
                assert len(held) - prompt <= policy.kept(generated)
    assert cache.get_seq_length() == tokens.column
    assert cache.stats().held == [len(tokens.held(row)) - prompt for row in range(rows)]


def test_one_launch_for_all_layers_and_no_allocation(monkeypatch):
    launches = []
    move = slots.move_slots_
    monkeypatch.setattr(
        slots, "move_slots_", lambda tensors, *plan: (launches.append(len(tensors)), move(tensors, *plan))
    )
    policy, cache = TextEviction.paper(8, 0.5), EvictionCache(windowed("llava").config, capacity=16)
    tokens = Tokens(cache, 2)
    tokens.feed(6)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for _ in range(30):
        tokens.feed(1)
        if any(cache.table.excess(policy)):
            cache.table.evict(torch.rand(2, cache.table.span), policy)
    evictions = cache.stats().evicted[0] // 5
    assert evictions >= 4
    assert launches == [2 * len(cache.layers) + 2] * evictions, "K and V of all layers and the table, at once"
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


def test_one_token_for_each_new_one_moves_nothing(monkeypatch):
    monkeypatch.setattr(slots, "move_slots_", None)
    policy, cache = TextEviction.paper(4, 1.0), EvictionCache(windowed("llava").config)
    tokens = Tokens(cache, 2)
    tokens.feed(3)
    for _ in range(12):
        tokens.feed(1)
        if any(cache.table.excess(policy)):
            cache.table.evict(torch.rand(2, cache.table.span), policy)
    assert cache.stats().evicted == [8, 8]
    assert cache.stats().physical == 3 + 5


@pytest.mark.parametrize("layers,scored", [("last", 1), ("all", 3)])
def test_scores_are_taken_on_steps_that_evict_only(monkeypatch, layers, scored):
    taken = []
    score = capture.score
    monkeypatch.setattr(capture, "score", lambda *args: (taken.append(1), score(*args))[1])
    model = copy.deepcopy(windowed("llava"))
    with asymvlm.patch(model, text=TextEviction.paper(6, 0.5, layers=layers)) as handle:
        model.generate(**tiny.make_batch("llava", "left_padded"), do_sample=False, max_new_tokens=20)
    evictions = handle.last.eviction.evicted[0] // 4
    assert evictions == 4
    assert len(taken) == evictions * scored


def reachable(item: object, seen: dict[int, torch.Tensor], depth: int = 6) -> dict[int, torch.Tensor]:
    if isinstance(item, torch.Tensor):
        seen[item.untyped_storage().data_ptr()] = item
    elif depth and isinstance(item, (list, tuple)):
        for entry in item:
            reachable(entry, seen, depth - 1)
    elif depth and hasattr(item, "__dict__"):
        for entry in vars(item).values():
            reachable(entry, seen, depth - 1)
    return seen


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_bytes_are_those_of_the_tensors(family, static):
    model = copy.deepcopy(windowed(family))
    with asymvlm.patch(model, text=TextEviction.paper(6, 0.5)) as handle:
        options = {"cache_implementation": "static"} if static else {}
        result = model.generate(**tiny.make_batch(family, "left_padded"), **GREEDY, **options, max_new_tokens=20)
    cache = result.past_key_values
    stats = cache.stats()
    assert stats == handle.last.eviction.cache
    tensors = reachable(cache, {}).values()
    small = 256  # of what a step leaves behind: an index of a few numbers, the window's width
    assert 0 <= sum(tensor.untyped_storage().nbytes() for tensor in tensors) - stats.nbytes < small
    kv = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert stats.kv_bytes == sum(tensor.untyped_storage().nbytes() for tensor in kv)
    prompt = stats.logical - 19
    assert (stats.held, stats.evicted) == ([3] * 3, [16] * 3)
    assert stats.physical == prompt + 3
    assert stats.capacity == prompt + 7


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_tokens():
    model = tiny.build("llava", num_hidden_layers=1, max_position_embeddings=4096)
    held = []
    with asymvlm.patch(model, text=TextEviction.paper(64, 0.5)) as handle:
        hook = model.get_decoder().register_forward_hook(
            lambda _, args, kwargs, out: held.append(cache_in(kwargs).stats().nbytes), with_kwargs=True
        )
        model.generate(**tiny.make_batch("llava", "single"), do_sample=False, max_new_tokens=2001, eos_token_id=None)
        hook.remove()
    assert len(held) == 2001
    assert len({*held[1:]}) == 1, "the cache must not grow"
    stats = handle.last.eviction.cache
    assert (stats.logical - stats.capacity, stats.evicted) == (2000 - 65, [33 * 59])


def test_a_cache_of_unknown_length_grows_in_chunks():
    cache = EvictionCache(windowed("llava").config)
    tokens, sizes = Tokens(cache, 1), []
    for _ in range(600):
        tokens.feed(1)
        sizes.append(cache.stats().capacity)
    assert tokens.held(0) == list(range(600))
    assert len({*sizes}) <= 6
    assert sizes[-1] < 600 * 1.4


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_reset_cache_is_a_new_one(static):
    cache = EvictionCache(windowed("llava").config, capacity=32, static=static)
    for _ in range(2):
        tokens = Tokens(cache, 2)
        tokens.feed(5)
        for _ in range(6):
            tokens.feed(1)
        cache.table.evict(torch.rand(2, 32 if static else 11), TextEviction.paper(4, 0.5))
        assert cache.stats().evicted == [4, 4]
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_full_static_cache_raises_rather_than_overwrites():
    cache = EvictionCache(windowed("llava").config, capacity=4, static=True)
    tokens = Tokens(cache, 1)
    tokens.feed(3)
    tokens.feed(1)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        tokens.feed(1)


def test_rows_are_repeated_and_selected():
    cache = EvictionCache(windowed("llava").config)
    tokens = Tokens(cache, 2)
    tokens.feed(4)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    tokens.rows = 2
    assert cache.layers[0].keys[:, 0, :4, 0].tolist() == [[1000, 1001, 1002, 1003], [0, 1, 2, 3]]
    assert cache.stats().held == [0, 0]


@pytest.mark.parametrize("settings_", [
    dict(threshold=0, retention=0.5), dict(threshold=8, retention=0.0), dict(threshold=8, retention=1.5),
    dict(threshold=2.5, retention=0.5), dict(threshold=8, retention=0.5, mode="bulk"),
    dict(threshold=8, retention=0.5, recent=-1), dict(threshold=8, retention=0.5, layers="first"),
    dict(threshold=8, retention=0.5, sliding="drop"), dict(threshold=8, retention=0.5, recent=5),
    dict(threshold=3, retention=0.2), dict(threshold=True, retention=0.5), dict(threshold=8, retention="half"),
    dict(threshold=8, retention=0.5, score="mean"), dict(threshold=8, retention=0.5, scope="heads"),
], ids=str)  # fmt: skip
def test_settings_are_checked(settings_):
    with pytest.raises(ValueError, match=r"(must be .* got|must be at least)"):
        TextEviction(**settings_)


def test_settings_that_exclude_each_other():
    for settings_, told in (
        (
            dict(method=LastRow(), score="last"),
            "pass it or them, got method=LastRow.* beside score='last' and scope=None",
        ),
        (dict(method=H2O(sinks=4)), "sinks must be None, got 4; CacheLimit"),
        (dict(layers="all"), "layers='all' is for one choice for all layers, scope='decoder', got scope='layer'"),
        (dict(sliding="mask"), "sliding='mask' is for one choice .* got scope='layer'"),
    ):
        with pytest.raises(ValueError, match=told):
            TextEviction(8, 0.5, **settings_)
    usual = TextEviction(9, 0.5)
    assert (usual.recent, usual.guard, usual.scored_by) == (None, 2, H2O(2 / 3, scope="layer"))
    assert dataclasses.replace(usual, threshold=36).guard == 12
    paper = TextEviction.paper(8, 0.5, layers="all")
    assert (paper.guard, paper.scored_by, paper.layers) == (1, LastRow(), "all")
    assert TextEviction(8, 0.5, score="last", scope="head").scored_by == LastRow(scope="head")


def test_turn_settings_are_checked():
    for wrong in (dict(threshold=-1), dict(retention=0), dict(retention=2.0)):
        with pytest.raises(ValueError, match=r"must be .* got"):
            TurnEviction(**wrong)


def test_a_decoder_without_full_attention_is_refused():
    model = tiny.build("mistral3", sliding_window=12)
    with pytest.raises(ValueError, match="needs a full-attention layer"):
        asymvlm.patch(model, text=TextEviction.paper(8, 0.5))
    assert "_asymvlm_handle" not in vars(model)
