"""Budgets as JSON: ``{"type": "threshold", "gap_low": 0.2, ...}``, the fields of the budget beside its type."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asymvlm.files.json_files import read_object
from asymvlm_kernels import LinearBudget, RelativeThresholdBudget, ThresholdBudget, UniformBudget

BudgetClass = type[UniformBudget] | type[ThresholdBudget] | type[LinearBudget] | type[RelativeThresholdBudget]
AnyBudget = UniformBudget | ThresholdBudget | LinearBudget | RelativeThresholdBudget

BUDGET_TYPES: dict[str, BudgetClass] = {
    "uniform": UniformBudget,
    "threshold": ThresholdBudget,
    "linear": LinearBudget,
    "relative": RelativeThresholdBudget,
}


def budget_to_dict(budget: AnyBudget) -> dict[str, Any]:
    """The JSON form of a budget; `budget_from_dict` reads it back to an equal one.

    Raises:
        ValueError: if the class of ``budget`` has no JSON type.
    """
    for name, budget_class in BUDGET_TYPES.items():
        if type(budget) is budget_class:
            return {"type": name, **dataclasses.asdict(budget)}
    raise ValueError(f"no JSON type for {type(budget).__name__}, wanted one of {_known_types()}")


def budget_from_dict(record: Mapping[str, Any]) -> AnyBudget:
    """Build a budget from its JSON form; fields with a default may be left out.

    Raises:
        ValueError: on an unknown type, an unknown or missing field, or a value the budget refuses. Names what was found
            and what was wanted.
    """
    name = record.get("type")
    if not isinstance(name, str) or name not in BUDGET_TYPES:
        found = "no field 'type'" if "type" not in record else f"type {name!r}"
        raise ValueError(f"{found}, wanted a budget type of {_known_types()}")
    budget_class = BUDGET_TYPES[name]
    values = {key: value for key, value in record.items() if key != "type"}
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(budget_class)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown field {unknown[0]!r} for budget type {name!r}, wanted {', '.join(fields)}")
    if missing := [field for field, required in fields.items() if required and field not in values]:
        raise ValueError(f"budget type {name!r} lacks {', '.join(missing)}, wanted {', '.join(fields)}")
    return budget_class(**values)


def load_budget(path: str | Path) -> AnyBudget:
    """Read a budget from a JSON file.

    Raises:
        ValueError: if the file cannot be read, is no JSON object, or describes no valid budget; starts with the path.
    """
    record = read_object(path, _EXAMPLE)
    try:
        return budget_from_dict(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_budget(budget: AnyBudget, path: str | Path) -> None:
    """Write a budget as JSON; `load_budget` reads back an equal one.

    Raises:
        ValueError: if the class of ``budget`` has no JSON type.
        OSError: if the file cannot be written.
    """
    Path(path).write_text(json.dumps(budget_to_dict(budget), indent=2) + "\n", encoding="utf-8")


_EXAMPLE = '{"type": "uniform", "ratio": 0.5}'


def _known_types() -> str:
    return ", ".join(repr(name) for name in BUDGET_TYPES)
