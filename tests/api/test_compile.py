"""Compiled decode steps: right, without graph breaks from the hooks, few graphs over several keep counts."""

from __future__ import annotations

import pytest
import torch
from checks import uniform
from tiny import make_batch
from torch._dynamo.utils import counters
from transformers import CompileConfig

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
