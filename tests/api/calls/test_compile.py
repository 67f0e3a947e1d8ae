"""Compiled decode steps: right, without graph breaks from the hooks, few graphs over several keep counts."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from evicted_reference import Masked
from tiny import make_batch
from torch._dynamo.utils import counters
from transformers import CompileConfig
from windowed import windowed

import asymvlm


@pytest.fixture
def on_cpu():
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    torch._dynamo.reset()
    counters.clear()
    yield config
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
@pytest.mark.slow
def test_static_decode_over_three_keep_counts(family, model, on_cpu):
    inputs = make_batch(family, "single")
    graphs = []
    for ratio in (0.25, 0.5, 0.75):
        with asymvlm.patch(model, vision=uniform(ratio)):
            expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)
            compiled = {"cache_implementation": "static", "compile_config": on_cpu}
            found = model.generate(**inputs, do_sample=False, max_new_tokens=6, **compiled)
        assert torch.equal(found, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[2] == graphs[1], "another keep count compiles again"
    breaks = dict(counters["graph_break"])
    if family != "gemma3":  # its windows by position read the length of the cache
        assert not breaks


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.slow
def test_eviction_is_part_of_the_compiled_step(family, on_cpu):
    on_cpu.fullgraph = True
    model, inputs = copy.deepcopy(windowed(family)), make_batch(family, "one_image_each")
    ids, logits = Masked(model, inputs, threshold=5, retention=0.5).generate(14)
    with asymvlm.patch(model, text=asymvlm.TextEviction.paper(5, 0.5)) as handle:
        for _ in range(2):
            found = model.generate(
                **inputs, **GREEDY, max_new_tokens=14, cache_implementation="static", compile_config=on_cpu
            )
            assert torch.equal(found.sequences[:, -14:], ids)
            assert_close(torch.stack(found.logits, 1), logits, atol=1e-4)
            assert handle.last.eviction.evicted == [8, 8, 8]
            assert 1 <= counters["stats"]["unique_graphs"] <= 2, "steps that evict compile again"
    assert not counters["graph_break"]
