"""Budgets survive the way through a file, and a bad file says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asymvlm.settings.budget_file import AnyBudget, budget_from_dict, budget_to_dict, load_budget, save_budget
from asymvlm_kernels import LinearBudget, ThresholdBudget, UniformBudget

BUDGETS = [
    UniformBudget(0.3),
    ThresholdBudget(0.1, 0.25, 0.75, 0.5, 0.25),
    LinearBudget(0.5, -1.25, 0.218),
    LinearBudget(0.5, 2.0, 0.1, minimum=0.05, maximum=1.0),
]


@pytest.mark.parametrize("budget", BUDGETS)
def test_saved_budget_loads_equal(budget: AnyBudget, tmp_path: Path) -> None:
    save_budget(budget, tmp_path / "budget.json")
    assert load_budget(tmp_path / "budget.json") == budget
    assert json.loads((tmp_path / "budget.json").read_text()) == budget_to_dict(budget)


def test_fields_with_a_default_may_be_left_out() -> None:
    assert budget_from_dict({"type": "linear", "target": 0.5, "slope": 1, "mean_gap": 0.2}) == LinearBudget(0.5, 1, 0.2)


@pytest.mark.parametrize(
    "text,words",
    [
        ("{", "not JSON"),
        ("", "the file is empty, wanted"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "JSON list found, wanted an object"),
        ("{}", "no field 'type', wanted a budget type of 'uniform'"),
        ('{"type": "square"}', "type 'square', wanted"),
        ('{"type": ["uniform"]}', "wanted a budget type"),
        ('{"type": "uniform"}', "lacks ratio"),
        ('{"type": "uniform", "ratio": 0.5, "extra": 1}', "unknown field 'extra'"),
        ('{"type": "uniform", "ratio": "half"}', "'half'"),
        ('{"type": "uniform", "ratio": true}', "True"),
        ('{"type": "uniform", "ratio": NaN}', "the number NaN is not finite"),
        ('{"type": "uniform", "ratio": 1e400}', "the number 1e400"),
        (f'{{"type": "uniform", "ratio": 1{"0" * 400}}}', "of 401 digits is not finite or too large"),
        ('{"type": "threshold", "gap_low": 0.1}', "lacks gap_high, conservative, moderate, aggressive"),
    ],
)
def test_bad_file_names_itself_and_the_fault(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json: ") as caught:
        load_budget(file)
    assert words in str(caught.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        load_budget(tmp_path / "binary")


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text('{"type": "uniform", "ratio": 0.5}', encoding="utf-8-sig")
    assert load_budget(tmp_path / "budget.json") == UniformBudget(0.5)


def test_foreign_budget_has_no_json_type() -> None:
    with pytest.raises(ValueError, match="no JSON type for int"):
        budget_to_dict(3)  # type: ignore[arg-type]
