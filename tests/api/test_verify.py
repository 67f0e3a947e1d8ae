"""`asymvlm.verify` passes a right patch on every kind of model, and a planted fault of any kind fails it."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from checkpoint import checkpoint, page
from conftest import build_once
from model_state import changes, snapshot
from transformers import PreTrainedModel

import asymvlm
from asymvlm import TextEviction, UniformBudget, VisionPruning
from asymvlm.cli import main
from asymvlm.hf import versions
from asymvlm.verification import batch, closed, evicting, measure, pruning, removal, subject
from asymvlm.verification.report import FAIL, PASS, SKIPPED, UNSUPPORTED, CheckRow

__all__ = ["checkpoint", "page"]  # fixtures

FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "phi3_v", "qwen3_vl")
SHIPPED = Path(__file__).parents[2] / "bench" / "tinyvlm" / "checkpoint"
Spoil = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(autouse=True)
def fewer_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evictions instead of five; the shipped checkpoint is verified as it comes."""
    if "shipped" not in request.node.name:
        monkeypatch.setattr(subject, "EVICTION_STEPS", 12)
        monkeypatch.setattr(evicting, "EVICTION_STEPS", 12)


@pytest.fixture
def llava() -> PreTrainedModel:
    return copy.deepcopy(build_once("llava"))


def verdicts(result: asymvlm.Verification) -> dict[str, str]:
    return {row.check: row.verdict for row in result.rows}


def failed(result: asymvlm.Verification) -> list[str]:
    assert not result.passed
    return [row.check for row in result.rows if row.verdict == FAIL]


def spoiled(spoil: Spoil, model: PreTrainedModel, **settings: Any) -> Any:
    """`asymvlm.patch` with a fault: what the decoder is called with is spoiled while the patch is on."""

    @contextlib.contextmanager
    def patched() -> Iterator[asymvlm.PatchHandle]:
        with asymvlm.patch(model, **settings) as handle:
            hook = model.get_decoder().register_forward_pre_hook(
                lambda module, args, kwargs: (args, spoil(dict(kwargs))), with_kwargs=True
            )
            try:
                yield handle
            finally:
                hook.remove()

    return patched()


def plant(monkeypatch: pytest.MonkeyPatch, module: Any, spoil: Spoil) -> None:
    monkeypatch.setattr(module, "patch", lambda model, **settings: spoiled(spoil, model, **settings))


def steps_one_on(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("position_ids") is not None and kwargs["inputs_embeds"].shape[1] == 1:
        kwargs["position_ids"] = kwargs["position_ids"] + 1
    return kwargs


def images_one_on(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Six columns of the image in the prefill stand one position further on."""
    if kwargs.get("position_ids") is not None and kwargs["inputs_embeds"].shape[1] > 1:
        positions = kwargs["position_ids"].clone()
        positions[..., 5:11] += 1
        kwargs["position_ids"] = positions
    return kwargs


def padding_seen(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
    return kwargs


# -- what is right passes --------------------------------------------------------------------------------------------


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
    text = TextEviction(threshold=512, retention=0.5, sliding="mask", recent=4)
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
    assert any(row.difference for row in result.rows if row.check.startswith("pruned")), "bf16 rounds somewhere"


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_recurrent_layers_are_compared_with_the_kept_tokens_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, check = tiny.build(family), "pruned = kept tokens alone: last hidden states"
    result = asymvlm.verify(model, tiny.make_batch(family, "single"))
    assert result.passed, str(result)
    assert "whose state a mask does not reach" in next(row.note for row in result.rows if row.check == check)
    plant(monkeypatch, pruning, images_one_on)
    assert check in failed(asymvlm.verify(model, tiny.make_batch(family, "single")))


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


# -- what is wrong fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answer_one_position_on_fails_from_the_second_token_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, pruning, steps_one_on)
    result = asymvlm.verify(build_once(family), tiny.make_batch(family, "single"))
    assert "pruned = masked: 7 forced steps" in failed(result)
    assert verdicts(result)["pruned = masked: first-token logits"] == PASS
    assert "verification FAILED" in str(result)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_image_one_position_on_fails_in_the_prefill(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, pruning, images_one_on)
    found = failed(asymvlm.verify(build_once(family), tiny.make_batch(family, "single")))
    assert {"pruned = masked: last hidden states", "pruned = masked: first-token logits"} <= {*found}


def test_dropped_mask_fails(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, pruning, padding_seen)
    found = failed(asymvlm.verify(llava, tiny.make_batch("llava", "left_padded")))
    assert "pruned = masked: last hidden states" in found


def test_one_dropped_column_that_stays_visible_fails(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pruning.kept_columns

    def one_more(report: Any, real: torch.Tensor) -> torch.Tensor:
        keep = kept(report, real)
        keep[0, (~keep[0]).nonzero()[0]] = True
        return keep

    monkeypatch.setattr(pruning, "kept_columns", one_more)
    found = failed(asymvlm.verify(llava, tiny.make_batch("llava", "single")))
    assert {"pruned = masked: first-token logits", "K/V length of full-attention layers"} <= {*found}


def test_masked_run_that_masks_nothing_is_no_proof(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed.ClosedColumns, "_close", lambda self, mask, keys: mask)
    found = failed(asymvlm.verify(llava, tiny.make_batch("llava", "single")))
    assert "control: one kept token less is noticed" in found


def test_padding_seen_in_a_batch_alone_fails_there(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, batch, lambda kwargs: padding_seen(kwargs) if len(kwargs["inputs_embeds"]) > 1 else kwargs)
    found = failed(asymvlm.verify(llava, tiny.make_batch("llava", "single")))
    assert found == ["batch rows = single runs: row 1"], "it keeps fewer tokens, so it is the padded one"


def test_evicting_with_physical_positions_fails(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, evicting, steps_one_on)
    assert "evicted = masked: 12 forced steps" in failed(asymvlm.verify(llava, tiny.make_batch("llava", "single")))


def test_no_eviction_is_no_proof(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicting, "THRESHOLD", 30)
    result = asymvlm.verify(llava, tiny.make_batch("llava", "single"))
    assert failed(result) == ["evicted = masked"]
    assert "[0] tokens of each row" in str(result)


def test_what_a_patch_leaves_behind_fails(llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def leaving(model: PreTrainedModel, **settings: Any) -> Iterator[asymvlm.PatchHandle]:
        with asymvlm.patch(model, **settings) as handle:
            yield handle
        model.lm_head.weight.data[50] *= 1.001

    monkeypatch.setattr(evicting, "patch", leaving)
    found = failed(asymvlm.verify(llava, tiny.make_batch("llava", "single")))
    assert "removal: outputs" in found
    assert not any(check.startswith(("pruned", "batch")) for check in found), "all was well until then"

    @contextlib.contextmanager
    def hooking(model: PreTrainedModel, **settings: Any) -> Iterator[asymvlm.PatchHandle]:
        with asymvlm.patch(model, **settings) as handle:
            yield handle
        model.register_forward_pre_hook(lambda module, args: None)

    monkeypatch.setattr(evicting, "patch", hooking)
    result = asymvlm.verify(llava, tiny.make_batch("llava", "single"))
    assert failed(result) == ["removal: attributes, hooks, configuration"]
    assert "_forward_pre_hooks" in str(result)


def test_an_error_of_the_patch_is_a_failed_row_and_the_others_go_on(
    llava: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kwargs: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("a mechanism did not take hold\nand more")

    plant(monkeypatch, pruning, fail)
    result = asymvlm.verify(llava, tiny.make_batch("llava", "single"))
    assert failed(result) == ["pruned against masked"]
    row = next(row for row in result.rows if row.verdict == FAIL)
    assert row.note == "RuntimeError: a mechanism did not take hold"
    assert verdicts(result)["removal: attributes, hooks, configuration"] == PASS


def test_nothing_is_compared_by_a_model_that_is_far_from_itself() -> None:
    inputs = tiny.make_batch("paligemma", "single")
    del inputs["token_type_ids"]  # transformers then masks padded prompts otherwise than others
    result = asymvlm.verify(build_once("paligemma"), inputs)
    assert failed(result) == ["unpatched against itself"]
    assert verdicts(result)["pruned against masked"] == SKIPPED


def test_logits_that_are_no_numbers_fail() -> None:
    row = measure.judge("check", float("nan"), 0.0, 1.0)
    assert row.verdict == FAIL
    assert row.to_dict()["difference"] is None


@pytest.mark.parametrize("gap,verdict", [(0.01, PASS), (0.5, FAIL)])
def test_other_tokens_pass_only_where_their_logits_are_as_close_as_rounding(gap: float, verdict: str) -> None:
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0))
    logits /= logits.std(-1, keepdim=True)
    top = logits.amax(-1)
    logits[..., 7] = top + 1
    logits[0, 2, 9] = top[0, 2] + 1 + gap
    run = pruning.Run(torch.full((1, 4), 7), logits, logits, [])
    row = pruning.greedy_row("greedy", run, run, 0.0, 0.02)
    assert row.verdict == verdict
    assert "first in row 0 at step 2: 7 instead of 9" in row.note


# -- the model comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["the pruned run", "the masked run of the same evictions"])
def test_an_interrupt_restores_the_model(llava: PreTrainedModel, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny.make_batch("llava", "single")
    llava.generate(**inputs, max_new_tokens=1)
    before, armed = snapshot(llava), []

    def stop(*_: Any, **__: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        stop()
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with pytest.raises(KeyboardInterrupt):
        asymvlm.verify(llava, inputs, progress=lambda words: armed.append(1) if words == part else None)
    assert not changes(before, snapshot(llava))


# -- bad input -------------------------------------------------------------------------------------------------------


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


# -- the command line ------------------------------------------------------------------------------------------------


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


# -- versions that nobody tested -------------------------------------------------------------------------------------


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
