"""A fault of any kind, planted in the patched run, fails `asymvlm.verify`, and the model comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from model_state import changes, snapshot
from shared_models import build_once
from transformers import PreTrainedModel
from verifying import failed, fewer_steps, llava, verdicts

import asymvlm
from asymvlm.verification import batch, closed, evicting, measure, pruning
from asymvlm.verification.report import FAIL, PASS, SKIPPED

__all__ = ["fewer_steps", "llava"]  # fixtures

Spoil = Callable[[dict[str, Any]], dict[str, Any]]


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


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_image_one_position_on_fails_beside_recurrent_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, pruning, images_one_on)
    found = failed(asymvlm.verify(build_once(family), tiny.make_batch(family, "single")))
    assert "pruned = kept tokens alone: last hidden states" in found


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
    monkeypatch.setattr(closed.ClosedColumns, "_close", lambda self, mask, keys, chosen: mask)
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
