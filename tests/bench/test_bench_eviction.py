"""The eviction benchmark: its bytes are right, and a wrong answer ends it."""

from __future__ import annotations

import json

import pytest

import asymvlm
from bench import bench_eviction


def test_bytes_of_every_cache(tmp_path):
    file = tmp_path / "2000-01-01-eviction.json"
    arguments = ["--size", "tiny", "--tokens", "40", "--threshold", "8", "--rounds", "1", "--threads", "1"]
    assert bench_eviction.main([*arguments, "--file", str(file)]) == 0
    (case,) = json.loads(file.read_text())["cases"].values()
    rows = case["caches"]
    prompt, per_token = 16 + 36, 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, bytes
    held = {
        "DynamicCache": prompt + 39,
        "preallocated": prompt + 40,
        "evicting": prompt + 9,
        "evicting, static": prompt + 9,
    }
    assert {name: row["kv_mib"] for name, row in rows.items()} == {
        name: round(tokens * per_token / 2**20, 3) for name, tokens in held.items()
    }
    mean = prompt + 20  # tokens that a cache copied anew at each step holds
    assert rows["DynamicCache"]["written_kib_per_step"] == round(mean * per_token / 2**10, 1)
    assert rows["preallocated"]["written_kib_per_step"] == round(per_token / 2**10, 1)
    assert rows["preallocated"]["written_kib_per_step"] <= rows["evicting"]["written_kib_per_step"] < 2
    assert all(row["processor_ms_per_step"] > 0 for row in rows.values())


def test_a_wrong_eviction_ends_the_benchmark(monkeypatch):
    table = asymvlm.cache.growing.GrowingTable
    evict = table.evict
    monkeypatch.setattr(table, "evict", lambda self, scores, policy: evict(self, -scores, policy))
    with pytest.raises(SystemExit, match="wrong answer: evicting, static"):
        bench_eviction.verify("cpu")
