"""`asymvlm run` gives the library's own numbers, and JSON alone on stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import KV_BYTES_PER_TOKEN, QUESTION, VISION_TOKENS, checkpoint, own_checkpoint, page
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm
from asymvlm import UniformBudget, VisionPruning
from asymvlm.app.session import Session
from asymvlm_cli import main

__all__ = ["checkpoint", "own_checkpoint", "page"]  # fixtures

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run_json(checkpoint: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command with ``--json`` and whatever else is given; returns the object on stdout."""

    def run(*arguments: str, model: Path = checkpoint, images: tuple[Path, ...] = (page,)) -> dict[str, Any]:
        files = [word for image in images for word in ("--image", str(image))]
        code = main(["run", "--model", str(model), *files, "--question", QUESTION, "--json", *arguments])
        stdout, stderr = capsys.readouterr()
        assert code == 0, stderr
        assert stdout.count("\n") == 1, "one line of JSON and nothing else"
        record: dict[str, Any] = json.loads(stdout)
        return record

    return run


def library_answer(checkpoint: Path, page: Path, keep: float | None, tokens: int) -> tuple[str, list[int]]:
    """The same question through transformers and `asymvlm.patch` alone: the answer and the kept index."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    content = [{"type": "image", "image": Image.open(page)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    index: list[int] = []
    if keep is not None:
        handle = asymvlm.patch(model, vision=VisionPruning(budget=UniformBudget(keep)))
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    if keep is not None:
        assert handle.last is not None
        index = handle.last.index[0].tolist()
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), index


def test_answer_and_kept_index_are_the_librarys(run_json: Run, checkpoint: Path, page: Path) -> None:
    record = run_json("--keep", "0.25", "--max-new-tokens", "8")
    answer, index = library_answer(checkpoint, page, 0.25, 8)
    assert record["answer"] == answer
    assert record["report"]["kept_index"] == [index]
    assert record["report"]["kept"] == [4]
    assert record["budget"] == {"type": "uniform", "ratio": 0.25}
    assert 1 <= record["new_tokens"] <= 8


def test_half_is_the_default(run_json: Run) -> None:
    report = run_json("--max-new-tokens", "1")["report"]
    assert report["vision_tokens"] == [VISION_TOKENS]
    assert report["kept"] == [VISION_TOKENS // 2]
    assert report["tokens_before"][0] - report["tokens_after"][0] == VISION_TOKENS // 2


def test_keeping_everything_equals_the_unpatched_model(run_json: Run, checkpoint: Path, page: Path) -> None:
    assert run_json("--keep", "1", "--max-new-tokens", "8")["answer"] == library_answer(checkpoint, page, None, 8)[0]


def test_compare_measures_what_the_caches_hold(run_json: Run, checkpoint: Path, page: Path) -> None:
    record = run_json("--compare", "--max-new-tokens", "8")
    compare, report = record["compare"], record["report"]
    assert compare["answer_full"] == library_answer(checkpoint, page, None, 8)[0]
    assert compare["kv_bytes"] == {
        "full": report["tokens_before"][0] * KV_BYTES_PER_TOKEN,
        "pruned": report["tokens_after"][0] * KV_BYTES_PER_TOKEN,
    }
    times = compare["first_token_ms"]
    assert len(times["full_runs"]) == len(times["pruned_runs"]) == 5
    assert times["full"] == sorted(times["full_runs"])[2] > 0
    assert "median of 5 runs" in times["method"]


def test_budget_file_decides_the_count_and_the_tier(run_json: Run, tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    budget = {
        "type": "threshold",
        "gap_low": -2.0,
        "gap_high": -1.0,
        "conservative": 0.9,
        "moderate": 0.6,
        "aggressive": 0.3,
    }
    file.write_text(json.dumps(budget))
    record = run_json("--budget", str(file), "--max-new-tokens", "1")
    assert record["budget"] == budget
    assert record["report"]["tier"] == ["aggressive"]  # a gap is never below -1
    assert record["report"]["kept"] == [VISION_TOKENS * 3 // 10]


def test_several_images_are_one_prompt(run_json: Run, page: Path) -> None:
    report = run_json("--max-new-tokens", "1", images=(page, page))["report"]
    assert report["vision_tokens"] == [2 * VISION_TOKENS]
    assert report["image_grids"] == [[[4, 4], [4, 4]]]


def test_processor_without_chat_template_gets_placeholder_newline_question(run_json: Run, own_checkpoint: Path) -> None:
    (own_checkpoint / "chat_template.jinja").unlink()
    report = run_json("--max-new-tokens", "1", model=own_checkpoint)["report"]
    tokenizer = AutoProcessor.from_pretrained(own_checkpoint).tokenizer
    assert report["tokens_before"] == [VISION_TOKENS + len(tokenizer(f"\n{QUESTION}").input_ids)]


def test_dtype_reaches_the_model(run_json: Run) -> None:
    assert run_json("--dtype", "bfloat16", "--max-new-tokens", "1")["dtype"] == "bfloat16"


def test_noise_on_stdout_does_not_reach_the_json(run_json: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Session.generate

    def noisy(self: Session, *args: Any, **options: Any) -> Any:
        print("a library prints")
        return generate(self, *args, **options)

    monkeypatch.setattr(Session, "generate", noisy)
    run_json("--max-new-tokens", "1")  # asserts one line of JSON


def test_table_states_counts_work_bytes_and_times(
    checkpoint: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoint), "--image", str(page), "--question", QUESTION, "--max-new-tokens", "4"]
    assert main(["run", *arguments, "--compare"]) == 0
    rows = {}
    text = capsys.readouterr().out
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 4:
            rows[cells[0]] = cells[1:]
    assert rows["vision tokens (K kept)"] == ["16", "8", "50.0%"]
    assert rows["vision tower FLOPs"][2] == "-", "pruning saves nothing in the tower"
    assert rows["language model FLOPs, prefill"][0] != rows["language model FLOPs, prefill"][1]
    assert rows["K/V cache after prefill, measured"][2] == rows["prompt tokens"][2], "bytes go with tokens"
    assert rows["time to first token, median"][0].endswith(" ms")
    assert "vision tower, scoring and prefill included" in " ".join(text.split())
    assert "K = 8 of 16" in text


def test_measuring_restores_the_patch_and_stops_when_time_is_up(checkpoint: Path, page: Path) -> None:
    from asymvlm.app.loading import load

    session = load(str(checkpoint))
    inputs = session.prepare([Image.open(page)], QUESTION)
    with asymvlm.patch(session.model) as handle:
        assert len(session.first_token(inputs, handle, runs=50, seconds=0.0).full_ms) == 1
        assert handle.enabled
        handle.enabled = False
        assert len(session.first_token(inputs, handle, runs=2).pruned_ms) == 2
        assert not handle.enabled
    assert torch.equal(inputs["input_ids"], session.prepare([Image.open(page)], QUESTION)["input_ids"])


def test_a_method_by_name(run_json: Run) -> None:
    record = run_json("--method", "divprune", "--keep", "0.25", "--max-new-tokens", "2")
    assert record["report"]["method"] == "divprune"
    assert record["report"]["kept"] == [int(VISION_TOKENS * 0.25)]


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("--method", "nothing"), "--method: no method is called 'nothing'; known: .*vispruner"),
        (("--method", "tova"), "--method: no method is called 'tova'"),
        (("--method", "pyramiddrop", "--keep", "0.25"), "decides itself how many tokens stay: pass no"),
        (("--method", "fastv"), r"layers of a method must ascend within 1 \.\. 1, got \(2,\)"),
    ],
)
def test_methods_that_cannot_be_are_told(
    checkpoint: Path, page: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert main(["run", "--model", str(checkpoint), "--image", str(page), "--question", QUESTION, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error.strip()), error
    assert len(error.strip().splitlines()) <= 2, "beside what is being loaded"
