"""`asymvlm.verify` passes a right patch on every kind of model, tells mistakes, and runs from the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoint import checkpoint, page
from model_state import changes, snapshot
from shared_models import build_once
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from verifying import fewer_steps, llava, verdicts

import asymvlm
from asymvlm import TextEviction, UniformBudget, VisionPruning
from asymvlm.hf import versions
from asymvlm.verification import closed, pruning, removal
from asymvlm.verification.report import PASS, SKIPPED, UNSUPPORTED, CheckRow
from asymvlm_cli import main

__all__ = ["checkpoint", "fewer_steps", "llava", "page"]  # fixtures

FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "phi3_v", "qwen3_vl")
SHIPPED = Path(__file__).parents[3] / "bench" / "tinyvlm" / "checkpoint"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_patch_passes(family: str) -> None:
    model = build_once(family)
    model.generate(**tiny.make_batch(family, "single"), max_new_tokens=1)
    before = snapshot(model)
    result = asymvlm.verify(model, tiny.make_batch(family, "single"))
    assert result.passed, str(result)
    assert {*verdicts(result).values()} == {PASS}
    measured = [row for row in result.rows if row.tolerance is not None and row.noise is not None]
    assert len(measured) > 6
    for row in measured:
        small = row.difference is None or row.check.startswith("control") or row.difference < 2e-5
        assert small, "pruning equals masking far closer than what is allowed"
    control = next(row for row in result.rows if row.check.startswith("control"))
    assert control.difference > 100 * control.tolerance
    assert not changes(before, snapshot(model))


def test_left_padded_rows_with_their_own_eviction_in_eager_attention() -> None:
    """Windows that prompts and answers leave, and an eviction that sliding layers take part in."""
    model = tiny.build("gemma3", "eager", sliding_window=20)
    vision = VisionPruning(budget=UniformBudget(0.5))
    text = TextEviction.paper(512, 0.5, sliding="mask", recent=4)
    result = asymvlm.verify(model, tiny.make_batch("gemma3", "left_padded"), vision=vision, text=text, steps=4)
    assert result.passed, str(result)
    assert verdicts(result)["batch rows = single runs"] == SKIPPED
    assert verdicts(result)["evicted = masked: 12 forced steps"] == PASS
    assert model.config.get_text_config()._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_bfloat16_passes(family: str) -> None:
    model = tiny.build(family).bfloat16()
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in tiny.make_batch(family, "single").items()
    }
    result = asymvlm.verify(model, inputs)
    assert result.passed, str(result)
    pruned = [row for row in result.rows if row.check.startswith("pruned")]
    assert pruned
    assert all(row.verdict == PASS for row in pruned), "none is skipped"


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_recurrent_layers_are_compared_with_the_kept_tokens_alone(family: str) -> None:
    model, check = tiny.build(family), "pruned = kept tokens alone: last hidden states"
    result = asymvlm.verify(model, tiny.make_batch(family, "single"))
    assert result.passed, str(result)
    assert "whose state a mask does not reach" in next(row.note for row in result.rows if row.check == check)


def test_masked_run_of_flash_attention_is_in_sdpa_and_leaves_flash_on(llava: PreTrainedModel) -> None:
    """FlashAttention takes no dense mask."""
    inputs, config = tiny.make_batch("llava", "single"), llava.config.get_text_config()
    keep = torch.ones(1, 26, dtype=torch.bool)
    keep[0, 8:12] = False
    wanted = pruning.masked_run(llava, inputs, 3, closed.ClosedColumns([keep]))
    decoder = llava.get_decoder()
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    for each in configs.values():
        each._attn_implementation = {"": "flash_attention_2"}
    found = pruning.masked_run(llava, inputs, 3, closed.ClosedColumns([keep]))
    assert torch.equal(found.logits, wanted.logits)
    assert {each._attn_implementation for each in configs.values()} == {"flash_attention_2"}
    config.attn_logit_softcapping = 30.0
    assert closed.reference_kind(llava) == "eager", "sdpa cannot cap logits"


@pytest.mark.skipif(bool(tiny.FAMILIES["llama4"].broken), reason="the unpatched model fails on this transformers")
def test_what_eviction_does_not_support_is_said_and_no_failure() -> None:
    result = asymvlm.verify(tiny.build("llama4"), tiny.make_batch("llama4", "single"))
    row = next(row for row in result.rows if row.check.startswith("evicted"))
    assert (row.verdict, "chunked_attention" in row.note) == (UNSUPPORTED, True)
    assert result.passed


def test_compact_positions_and_keeping_everything_are_skipped_with_the_reason(llava: PreTrainedModel) -> None:
    for vision, words in (
        (VisionPruning(positions="compact"), "renumbers"),
        (VisionPruning(budget=UniformBudget(1.0)), "keeps all"),
    ):
        result = asymvlm.verify(llava, tiny.make_batch("llava", "two_images"), vision=vision)
        row = next(row for row in result.rows if row.check == "pruned against masked")
        assert row.verdict == SKIPPED
        assert words in row.note
        assert result.passed


@pytest.mark.parametrize(
    "change,words",
    [
        ({"pixel_values": None}, ["an image (pixel_values)", "pass inputs=processor"]),
        ({"input_ids": None}, ["input_ids of shape (B, S), got NoneType"]),
        ({"attention_mask": torch.ones(1, 3)}, ["the shape of input_ids (1, 26)"]),
        ({"position_ids": torch.zeros(1, 26)}, ["leave position_ids out"]),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, ["the unpatched model cannot run these inputs"]),
    ],
    ids=["no image", "no ids", "mask", "positions", "two pictures"],
)
def test_bad_inputs_are_told(llava: PreTrainedModel, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"inputs|attention_mask") as caught:
        asymvlm.verify(llava, {**tiny.make_batch("llava", "single"), **change})
    for word in words:
        assert word in str(caught.value)


def test_bad_models_and_settings_are_told(llava: PreTrainedModel) -> None:
    inputs = tiny.make_batch("llava", "single")
    with pytest.raises(ValueError, match="steps must be a whole number of at least 2, got 1"):
        asymvlm.verify(llava, inputs, steps=1)
    with pytest.raises(ValueError, match="padded on the left"):
        asymvlm.verify(llava, tiny.make_batch("llava", "right_padded"))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        asymvlm.verify(llava.train(), inputs)
    with asymvlm.patch(llava.eval()), pytest.raises(RuntimeError, match="remove the handle first"):
        asymvlm.verify(llava, inputs)
    with pytest.raises(ValueError, match=r"cannot make inputs for 'qwen2_5_vl' alone .* pass inputs=processor"):
        asymvlm.verify(build_once("qwen2_5_vl"))


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_inputs_are_drawn_where_the_family_allows(family: str) -> None:
    assert asymvlm.verify(build_once(family)).passed


def test_a_processor_makes_the_inputs(checkpoint: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    result = asymvlm.verify(model, processor=AutoProcessor.from_pretrained(checkpoint))
    assert result.passed, str(result)
    assert any("8 dropped" in row.note for row in result.rows)


def test_command_verifies_the_shipped_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", str(SHIPPED)]) == 0
    stdout, stderr = capsys.readouterr()
    assert "verification passed" in stdout
    assert "83 kept tokens, 72 dropped" in stdout
    assert "verify: the masked run of the same tokens" in stderr


def test_command_takes_the_callers_own_and_prints_json(
    checkpoint: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image", str(page), "--question", "What is due?", "--keep", "0.25", "--attn", "eager", "--json"]
    assert main(["verify", "--model", str(checkpoint), "--dtype", "bfloat16", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"]
    assert record["environment"]["dtype"] == "bfloat16"
    assert record["environment"]["attention"] == "eager"
    assert record["budget"] == {"type": "uniform", "ratio": 0.25}
    assert {"check", "verdict", "difference", "noise", "tolerance", "note"} == {*record["rows"][0]}
    assert any("12 dropped" in row["note"] for row in record["rows"])


def test_command_ends_with_1_on_a_failed_check(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(removal, "run", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("planted")))
    assert main(["verify", "--model", str(checkpoint)]) == 1
    assert "RuntimeError: planted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--keep", "2"], "--keep: 2 found"),
        (["--attn", "none_such"], "cannot use 'none_such'"),
        (["--image", "no.png"], "no such file"),
        (["--steps", "1"], "--steps"),
    ],
)
def test_command_ends_with_2_on_a_mistake(
    arguments: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--model", str(checkpoint), *arguments]) == 2
    stdout, stderr = capsys.readouterr()
    assert words in stderr
    assert stdout == ""


def test_untested_transformers_is_named_once(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_warned", False)
    monkeypatch.setattr("transformers.__version__", "5.99.1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", asymvlm.UntestedVersionWarning)
        asymvlm.patch(llava).remove()
        asymvlm.patch(llava).remove()
    caught = [warning for warning in caught if issubclass(warning.category, asymvlm.UntestedVersionWarning)]
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the caller of patch"
    for words in ("5.99.1", "5.17, 5.23, 5.24", "asymvlm verify --model DIR"):
        assert words in str(caught[0].message)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.1", "5.24.0"])
def test_tested_transformers_is_silent(
    version: str, llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(versions, "_warned", False)
    monkeypatch.setattr("transformers.__version__", version)
    asymvlm.patch(llava).remove()
    assert not [warning for warning in recwarn if issubclass(warning.category, asymvlm.UntestedVersionWarning)]


def test_table_shows_every_row_and_its_numbers() -> None:
    rows = [CheckRow("one", PASS, 1e-6, 2e-6, 1e-4, "a note"), CheckRow("two", SKIPPED, note="a reason")]
    result = asymvlm.Verification("Model", {"dtype": "float32"}, rows)
    text = str(result)
    for words in ("Model: dtype float32", "1.0e-06", "2.0e-06", "1.0e-04", "a note", "skipped", "a reason"):
        assert words in text
    assert result.passed
    assert not asymvlm.Verification("Model", {}, rows[1:]).passed, "nothing was verified"
