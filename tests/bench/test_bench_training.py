"""The benchmark of a training step: what it writes, and that a wrong gradient ends it."""

from __future__ import annotations

import json

import pytest
import torch

from bench import bench_training


def test_every_variant_is_measured(tmp_path):
    file = tmp_path / "training.json"
    arguments = ["--size", "tiny", "--rounds", "1", "--threads", "1", "--batch", "2", "--file", str(file)]
    assert bench_training.main(arguments) == 0
    (case,) = json.loads(file.read_text())["cases"].values()
    assert set(case["variants"]) == set(bench_training.VARIANTS)
    assert all(row["step_ms"] > 0 for row in case["variants"].values())


def test_a_wrong_gradient_ends_the_benchmark():
    gradients = {"masks": torch.ones(4), "key-bias attention": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    bench_training.check(gradients, 0.2)
    with pytest.raises(SystemExit, match=r"by key-bias attention is .* away from that by masks"):
        bench_training.check(gradients, 0.05)
    with pytest.raises(SystemExit, match="wrong answer"):
        bench_training.check({"masks": torch.ones(4), "other": torch.full((4,), float("nan"))}, 0.05)
