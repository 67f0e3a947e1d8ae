"""The end-to-end benchmark: what it counts is right, and a wrong answer ends it."""

from __future__ import annotations

import json

import pytest
import torch

from bench import bench_generate, vlm
from bench.harness import tables


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "2000-01-01-generate.json"
    assert bench_generate.main(["--size", "tiny", "--rounds", "1", "--threads", "1", "--file", str(file)]) == 0
    return json.loads(file.read_text())


def test_tokens_and_bytes_of_every_ratio(content):
    (case,) = content["cases"].values()
    rows = case["ratios"]
    assert {float(ratio): row["tokens"] for ratio, row in rows.items()} == {1.0: 52, 0.75: 48, 0.5: 44, 0.25: 40}
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, bytes
    assert rows["0.5"]["kv_mib"] == round(44 * per_token / 2**20, 2)
    assert all(row["first_token_ms"] > 0 for row in rows.values())
    assert rows["0.5"]["prune_ms"] > 0
    assert rows["1.0"]["prune_ms"] == 0, "nothing of ours may run at ratio 1"


def test_the_table_names_the_command_and_every_ratio(content):
    text = tables.generate_blocks(content)
    assert "`python -m bench.bench_generate --size tiny" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| 1.0", "| 0.75", "| 0.5", "| 0.25",
    ]  # fmt: skip


def test_a_wrong_selection_ends_the_benchmark(monkeypatch):
    size = vlm.SIZES["tiny"]
    model = vlm.build(size, "cpu", torch.float32)
    inputs = vlm.make_inputs(model, size, 1)
    bench_generate.check(model, inputs)
    shorten = bench_generate.asymvlm.prompt.choosing
    original = shorten.prune_sequence
    monkeypatch.setattr(  # the worst instead of the best
        shorten, "prune_sequence", lambda embeds, vision, text, weight, *args, **kwargs: original(
            embeds, vision, text, -torch.ones(embeds.shape[-1]), *args, **kwargs
        ),
    )  # fmt: skip
    with pytest.raises(SystemExit, match="wrong answer"):
        bench_generate.check(model, inputs)
