"""Limits of the whole cache in calls of every kind: batches, parts of a prompt, beams, padding, bytes, refusals."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close
from loops import positions_of
from transformers import LogitsProcessor
from windowed import windowed

import asymvlm
from asymvlm import CacheLimit, EvictionCache, TextEviction
from asymvlm.methods import H2O, TOVA, DuoAttention, PyramidKV, RandomEviction, SnapKV, StreamingLLM, VLCache

LIMIT = 14
RETRIEVAL = ((False, True), (True, False), (False, True))
EVERY = [TOVA(), H2O(), SnapKV(window=4), PyramidKV(window=4), VLCache(), DuoAttention(RETRIEVAL), StreamingLLM()]
EVERY += [RandomEviction(scope="head", sinks=2)]


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_a_row_is_the_same_in_any_batch(method):
    """Shares of unequal prompts, left padding."""
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    with asymvlm.patch(model, cache=CacheLimit(method, share=0.4)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        held = lines_of(found.past_key_values, inputs)
        tokens = handle.last.eviction.cache.tokens
        assert len({*tokens}) > 1
        for number, row in enumerate(tiny.single_rows("llava", "left_padded")):
            alone = model.generate(**row, **GREEDY, max_new_tokens=5)
            assert lines_of(alone.past_key_values, row)[0] == held[number]
            assert_close(torch.stack(alone.logits)[:, 0], torch.stack(found.logits)[:, number])
            assert handle.last.eviction.cache.tokens == [tokens[number]]


@pytest.mark.parametrize("method", [EVERY[n] for n in (1, 2, 4, 6)], ids=lambda method: method.name)
def test_a_prompt_may_come_in_parts(method):
    """Beside pruning: transformers 5.17 feeds whole images in parts wrongly, without a patch too."""
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    with asymvlm.patch(model, keep=0.75, cache=CacheLimit(method, share=0.5)):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        parts = model.generate(**inputs, **GREEDY, max_new_tokens=3, prefill_chunk_size=11)
    assert lines_of(parts.past_key_values, inputs) == lines_of(found.past_key_values, inputs)
    assert_close(torch.stack(parts.logits), torch.stack(found.logits))


def lines_of(cache: EvictionCache, inputs) -> list[list[list[int]]]:
    """Of each row, what its lines in each group of layers hold: columns, counted from the row's first token."""
    rows = []
    for row, mask in enumerate(inputs["attention_mask"]):
        pads = int((mask == 0).sum())
        lines = [line for table in cache.tables for line in table.slot_pos[row * table.heads : (row + 1) * table.heads]]
        rows.append([sorted(column - pads for column in line.tolist() if column >= 0) for line in lines])
    return rows


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "phi3_v"])
def test_a_limit_that_is_never_reached_leaves_the_model_alone(family):
    plain, inputs = windowed(family), tiny.make_batch(family, "left_padded")
    expected = plain.generate(**inputs, **GREEDY, max_new_tokens=4)
    model = copy.deepcopy(plain)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in (H2O(), SnapKV(window=4)):
        with asymvlm.patch(model, cache=CacheLimit(method, tokens=1000)) as handle:
            found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
            assert handle.last.eviction.evicted == [0, 0, 0]
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    again = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(torch.stack(again.logits), torch.stack(expected.logits))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "generate" not in vars(model)


def test_bytes_are_those_of_each_layer():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")
    full = model.generate(**inputs, **GREEDY, max_new_tokens=5).past_key_values
    width = full.layers[0].keys[0, :, 0].numel() * 2 * full.layers[0].keys.itemsize  # K and V of a token, all heads
    stats = {}
    for method in (SnapKV(window=4), PyramidKV(window=4, beta=5), DuoAttention(RETRIEVAL)):
        with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)) as handle:
            cache = model.generate(**inputs, **GREEDY, max_new_tokens=5).past_key_values
        stats[method.name] = handle.last.eviction.cache
        lengths = [table.span for table in cache.tables]
        assert stats[method.name].used_bytes == width * sum(lengths)
        assert stats[method.name].physical == max(lengths)
        assert stats[method.name].kv_bytes == sum(
            tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values)
        )
    assert stats["snapkv"].token_bytes == stats["pyramidkv"].token_bytes == 3 * (LIMIT + 4) * width
    assert stats["pyramidkv"].used_bytes == stats["pyramidkv"].token_bytes
    assert stats["pyramidkv"].physical == 22 + 4
    seen = full.get_seq_length()
    assert stats["duoattention"].token_bytes == 3 * (seen + LIMIT) * width // 2
    assert stats["duoattention"].used_bytes == 3 * seen * width, "a layer's heads share its slots"


@pytest.mark.parametrize("method", [H2O(), StreamingLLM()], ids=lambda method: method.name)
def test_beams_carry_state_along(method):
    """Rows of beams hold what a row that was fed the same tokens holds."""
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")
    options = dict(num_beams=3, do_sample=False, return_dict_in_generate=True, max_new_tokens=6)
    with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)):
        found = model.generate(**inputs, **options, num_return_sequences=3, output_scores=True)
        cache = found.past_key_values
        row = cache.table.rows  # the state of the beams before the last step
        assert row == 3
        made = found.sequences[:1, inputs["input_ids"].shape[1] :]
        forced = model.generate(**inputs, **GREEDY, max_new_tokens=6, logits_processor=[Forced(made)])
    beams = [[line[line >= 0].sort().values.tolist() for line in table.slot_pos] for table in cache.tables]
    alone = [
        [line[line >= 0].sort().values.tolist() for line in table.slot_pos] for table in forced.past_key_values.tables
    ]
    heads = cache.table.heads
    tables = list(zip(cache.tables, forced.past_key_values.tables))
    same = [all(x[beam * heads : (beam + 1) * heads] == one for x, one in zip(beams, alone)) for beam in range(3)]
    assert any(same), "one of the beams is the best answer's"
    for name in cache.table.state:
        for table, other in tables:
            sums = [by_column(table, name)[beam * heads : (beam + 1) * heads] for beam in range(3)]
            assert any(torch.allclose(one, by_column(other, name), atol=1e-5) for one in sums)


def by_column(table, name: str) -> torch.Tensor:
    row = torch.zeros(table.lines, table.length + 2)
    return row.scatter_(1, table.slot_pos[:, : table.span].long() + 2, table.slot_state(name))[:, 2:]


class Forced(LogitsProcessor):
    """Lets a call generate given tokens."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf).scatter_(1, self.ids[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced


def test_a_right_padded_row_keeps_what_a_left_padded_one_does():
    model = copy.deepcopy(windowed("llava"))
    for method in (H2O(), SnapKV(window=4), StreamingLLM()):
        found = []
        with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)), torch.no_grad():
            for batch in ("left_padded", "right_padded"):
                inputs = tiny.make_batch("llava", batch)
                mask = inputs["attention_mask"] * (1 if batch == "left_padded" else 0)
                cache = model(**inputs, position_ids=positions_of("llava", model, inputs)).past_key_values
                found.append(lines_of(cache, {"attention_mask": mask + (mask.sum(1, keepdim=True) == 0)}))
        assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = copy.deepcopy(windowed("llava")).to(dtype), tiny.make_batch("llava", "left_padded")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for method in (H2O(), VLCache(scope="layer"), StreamingLLM()):
        with asymvlm.patch(model, cache=CacheLimit(method, tokens=LIMIT)) as handle:
            found = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        assert torch.stack(found.logits).isfinite().all()
        assert all(layer.keys.dtype == dtype for layer in found.past_key_values.layers)
        assert handle.last.eviction.cache.tokens == [LIMIT] * 3 or method.needs_density


def test_a_cache_that_was_reset_and_a_patch_that_was_off():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "left_padded")
    name = "past_key_values"
    with asymvlm.patch(model, cache=CacheLimit("tova", tokens=LIMIT)) as handle, torch.no_grad():
        first = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        first.past_key_values.reset()
        again = model.generate(**inputs, **GREEDY, max_new_tokens=4, **{name: first.past_key_values})
        assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))
        handle.enabled = False
        cache = EvictionCache(model.config, scope="layer", sinks=0, limited=True)
        model(**inputs, **{name: cache})
        assert cache.stats().tokens == inputs["attention_mask"].sum(1).tolist()
        handle.enabled = True
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        model(input_ids=torch.full((3, 1), 7), attention_mask=mask, **{name: cache})
        assert cache.stats().tokens == [LIMIT] * 3


def test_what_is_refused_before_a_call():
    for settings, told in (
        (dict(method="tova"), "pass tokens or share, one of them, got tokens=None and share=None"),
        (dict(method="tova", tokens=3, share=0.1), "pass tokens or share, one of them, got tokens=3 and share=0.1"),
        (dict(method="tova", tokens=0), "tokens must be a whole number of at least 1, got 0"),
        (dict(method="tova", share=1.5), r"share must be in \(0, 1\], got 1.5"),
        (
            dict(method="streamingllm", tokens=4),
            "always keeps 4 first and 1 newest tokens: the limit must be at least 5",
        ),
        (dict(method="snapkv", tokens=31), "always keeps 0 first and 32 newest tokens: the limit must be at least 32"),
        (dict(method=SnapKV(), tokens=64, protect_prompt=True), "protect_prompt leaves it none"),
        (dict(method="duoattention", tokens=9), "needs retrieval, which heads of each layer look far back, got none"),
        (
            dict(method="tova", tokens=9, sliding="mask"),
            "follows one choice for all layers, got a method of scope 'layer'",
        ),
        (dict(method="tova", tokens=9, sliding="drop"), "sliding must be 'keep' or 'mask', got 'drop'"),
    ):
        with pytest.raises(ValueError, match=told):
            CacheLimit(**settings)
    for make, told in (
        (lambda: H2O(recent_share=2), r"recent_share must be in \[0, 1\], got 2"),
        (lambda: SnapKV(kernel=4), "kernel must be odd and 1 or more, got 4"),
        (lambda: PyramidKV(scope="decoder"), "limits of their own, got scope 'decoder'"),
        (lambda: VLCache(scope="decoder"), "limits of their own, got scope 'decoder'"),
        (lambda: StreamingLLM(positions="new"), "positions must be 'reindexed' or 'original', got 'new'"),
        (
            lambda: TextEviction(8, 0.5, method="snapkv"),
            r"method 'snapkv' needs CacheLimit\(...\), got it in TextEviction",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            make()
    model = copy.deepcopy(windowed("phi3_v"))
    with pytest.raises(NotImplementedError, match="the rope_type 'longrope' is none of default, linear, llama3, yarn"):
        asymvlm.patch(model, cache=CacheLimit("streamingllm", tokens=9))
    assert "generate" not in vars(model)
    assert not any("_asymvlm_config" in vars(module) for module in model.modules())
    limit = CacheLimit("tova", tokens=9)
    with pytest.raises(ValueError, match="cache limits the whole cache: pass it without text, got both"):
        asymvlm.patch(model, cache=limit, text=TextEviction(8, 0.5))
    with pytest.raises(TypeError, match=r"cache must be CacheLimit\(...\) or None, got 9"):
        asymvlm.patch(model, cache=9)


def test_what_is_refused_in_a_call():
    model, inputs = copy.deepcopy(windowed("llava")), tiny.make_batch("llava", "single")

    def call(limit: CacheLimit, **options):
        with asymvlm.patch(model, cache=limit):
            return model.generate(**inputs, **{"max_new_tokens": 3, **options})

    tova = CacheLimit("tova", tokens=9)
    with pytest.raises(NotImplementedError, match="numbers prompts that come in one step, got a part"):
        call(CacheLimit("random eviction", tokens=9), prefill_chunk_size=5)
    with pytest.raises(NotImplementedError, match="needs a cache that grows, got a static one"):
        call(CacheLimit("oldest", tokens=9), cache_implementation="static")
    with pytest.raises(
        ValueError, match=r"EvictionCache\(config, scope='layer', sinks=0, limited=True\), got one with"
    ):
        call(tova, past_key_values=EvictionCache(model.config, scope="layer"))
    with pytest.raises(NotImplementedError, match="does not work with prompt_lookup_num_tokens"):
        call(tova, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="the limit must be at least 5, got 2"):
        call(CacheLimit(StreamingLLM(), share=0.1))
    with pytest.raises(ValueError, match=r"3 layers of 2 K/V heads, got layers of \[2, 2\] heads"):
        call(CacheLimit(DuoAttention(RETRIEVAL[:2]), tokens=9))
    with asymvlm.patch(model, cache=CacheLimit(VLCache(), tokens=9)), torch.no_grad():
        with pytest.raises(NotImplementedError, match="'vl-cache' needs `generate`, which tells where images are"):
            model(**inputs)
        ends = tiny.make_batch("llava", "ends_in_image")
        with pytest.raises(ValueError, match="'vl-cache' needs tokens behind the image, row 0 has none"):
            model.generate(**ends, max_new_tokens=3)
    with asymvlm.patch(model, cache=CacheLimit(H2O(), tokens=9)) as handle, torch.no_grad():
        handle.enabled = False
        cache = EvictionCache(model.config, scope="head", sinks=0, limited=True)
        model(**inputs, past_key_values=cache)
        handle.enabled = True
        with pytest.raises(ValueError, match="adds up attention from the first token on: 26 of the cache's 26 tokens"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with asymvlm.patch(model, cache=CacheLimit(StreamingLLM(), tokens=9)), torch.no_grad():
        cache = EvictionCache(model.config, sinks=4, limited=True)
        cache.begin(1, 3, model.device, None)
        cache.table.open = False
        with pytest.raises(ValueError, match="from the first token on: 3 of the cache's 3 tokens came without"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    protected = CacheLimit(StreamingLLM(), tokens=3, protect_prompt=True)
    with asymvlm.patch(model, cache=protected):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=6)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        with pytest.raises(NotImplementedError, match="know one prompt, got a second one"):
            model.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=2)
