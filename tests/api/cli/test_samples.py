"""Samples from JSONL and datasets, teacher-forced answers, and the metrics that judge answers."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from checkpoint import checkpoint, page
from PIL import Image

from asymvlm.app.loading import load
from asymvlm.app.metrics import anls, exact_match, relaxed_accuracy
from asymvlm.app.samples import DatasetQuestions, Prompts, prepare_prompt, prepare_with_answer, read_jsonl
from asymvlm.app.session import InputError
from asymvlm.cli.data import read_samples

__all__ = ["checkpoint", "page"]  # fixtures


def write(folder, *records):
    file = folder / "samples.jsonl"
    file.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return file


def test_records(tmp_path):
    file = write(
        tmp_path,
        {"image": "a.png", "question": " What? ", "answer": "7"},
        "",
        {"images": ["a.png", "/b.png"], "question": "Where?", "answers": ["x", 3]},
        {"image": "a.png", "question": "Who?"},
    )
    first, second, third = read_jsonl(file)
    assert (first.images, first.question, first.answers) == ((tmp_path / "a.png",), "What?", ("7",))
    assert [str(image) for image in second.images] == [str(tmp_path / "a.png"), "/b.png"]
    assert second.answers == ("x", "3")
    assert third.answers == ()


@pytest.mark.parametrize(
    "record,message",
    [
        ("{", "samples.jsonl:2: not JSON"),
        ([1], "samples.jsonl:2: list found, wanted an object with image, question, answer"),
        ({"question": "What?"}, "samples.jsonl:2: no 'image'"),
        ({"image": "a.png", "question": " "}, "samples.jsonl:2: 'question' ' ' found"),
        ({"image": "a.png", "question": "What?", "answer": {"a": 1}}, "samples.jsonl:2: 'answer'"),
        ({"image": {"path": "a.png"}, "question": "What?"}, "samples.jsonl:2: 'image' is a dict, wanted a path"),
        ({"image": "a\0.png", "question": "What?"}, "samples.jsonl:2: 'image' .* found, wanted a path"),
        ("[" * 100_000, "samples.jsonl:2: nested too deep"),
        ('{"image": "a.png", "question": "What?", "answer": 1e999}', "samples.jsonl:2: not JSON .the number 1e999"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path, record, message):
    with pytest.raises(InputError, match=message):
        read_jsonl(write(tmp_path, {"image": "a.png", "question": "What?"}, record))


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_read(tmp_path):
    file, odd = tmp_path / "samples.jsonl", "a\u2028b\x85c\x0bd"
    records = [{"image": "a.png", "question": odd}, {"image": "b.png", "question": "What?"}]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_bytes(text.encode("utf-8-sig"))
    assert [sample.question for sample in read_jsonl(file)] == [odd, "What?"]


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"image": "a.png", "question": "What?"}', encoding="utf-16")
    with pytest.raises(InputError, match=r"samples\.jsonl: not UTF-8 text \(byte 0\), wanted UTF-8"):
        read_jsonl(tmp_path / "samples.jsonl")


def test_missing_images_are_found_before_a_run(tmp_path, page):
    there = {"image": str(page), "question": "What?"}
    file = write(tmp_path, there, {"images": [str(page), "b.png"], "question": "What?"})
    with pytest.raises(InputError, match=r"1 of 3 image files are missing: .*samples.jsonl:2: image .*b.png"):
        read_samples(file, None, "", "", None)
    assert len(read_samples(file, None, "", "", 1)) == 1
    for name in ("~nobody_at_all/b.png", f"{'b' * 300}.png"):
        file = write(tmp_path, {"image": name, "question": "What?"})
        with pytest.raises(InputError, match="1 of 1 image files are missing"):
            read_samples(file.rename(tmp_path / "home.jsonl"), None, "", "", None)


def test_files_without_samples_are_named(tmp_path):
    with pytest.raises(InputError, match="no samples, wanted one JSON object a line"):
        read_jsonl(write(tmp_path, ""))
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_the_answer_stands_behind_the_prompt_and_carries_labels(checkpoint, page, tmp_path):
    session = load(str(checkpoint), device="cpu")
    (sample,) = read_jsonl(write(tmp_path, {"image": str(page), "question": "What is due?", "answer": "what is"}))
    prompt, whole = prepare_prompt(session, sample), prepare_with_answer(session, sample)
    length = prompt["input_ids"].shape[1]
    assert prompt["answers"] == ("what is",)
    assert torch.equal(whole["input_ids"][:, :length], prompt["input_ids"])
    assert whole["labels"][0, :length].eq(-100).all()
    assert torch.equal(whole["labels"][:, length:], whole["input_ids"][:, length:])
    tokenizer = session.processor.tokenizer
    assert tokenizer.decode(whole["input_ids"][0, length:], skip_special_tokens=True).strip() == "what is"
    assert whole["attention_mask"].shape == whole["input_ids"].shape
    out = session.model(**{name: value for name, value in whole.items() if name != "answers"})
    assert bool(out.loss.isfinite())
    assert torch.equal(Prompts(session, [sample])[0]["input_ids"], prompt["input_ids"])


def test_a_dataset(monkeypatch, page):
    class Rows(list):
        column_names = ["picture", "query", "label"]

    rows = Rows([{"picture": Image.open(page), "query": "What?", "label": ["a", "b"]}] * 3)
    module = types.SimpleNamespace(load_dataset=lambda name, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    columns = {"image": "picture", "question": "query", "answer": "label"}
    found = DatasetQuestions("pages", "train", columns)
    assert len(found) == 3
    assert found[0].answers == ("a", "b")
    assert found[0].open()[0].mode == "RGB"
    assert len(found[:2]) == 2
    with pytest.raises(InputError, match="has no column 'image', found picture, query, label"):
        DatasetQuestions("pages", "train", {"image": "image", "question": "query", "answer": "label"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets, which is not installed"):
        DatasetQuestions("pages", "train", columns)


def test_metrics():
    assert exact_match(" The  Answer", ["the answer"]) == 1
    assert exact_match("7", ["8", "9"]) == 0
    assert anls("kitten", ["sitting", "kitchen"]) == pytest.approx(1 - 2 / 7)
    assert anls("abc", ["xyz"]) == 0
    assert anls("", [""]) == 1
    assert anls("a  b", ["a b"]) == 1
    assert anls("abcd", ["abxy"]) == 0.5, "one half counts"
    assert relaxed_accuracy("1050", ["7", "1000"]) == 1
    assert relaxed_accuracy("1051", ["1000"]) == 0
    assert relaxed_accuracy("12%", ["0.12"]) == 1
    assert relaxed_accuracy("0.0", ["0"]) == 0, "ChartQA compares with an accepted 0 as text"
    assert relaxed_accuracy("Yes", ["yes"]) == 1
