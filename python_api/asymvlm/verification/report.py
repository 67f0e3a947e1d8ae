"""What `verify` found: one row a check."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, SKIPPED, UNSUPPORTED = "pass", "FAIL", "skipped", "not supported"


@dataclass(frozen=True)
class CheckRow:
    """One check. Differences are relative: of logits to their standard deviation, of hidden states to their norm."""

    check: str
    verdict: str  # PASS, FAIL, SKIPPED or UNSUPPORTED
    difference: float | None = None  # the largest one found; None where nothing is measured
    noise: float | None = None  # the unpatched model against itself, in the same measure
    tolerance: float | None = None  # what the difference may be
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``json.dumps``: a difference that is no number becomes None."""
        numbers = {name: getattr(self, name) for name in ("difference", "noise", "tolerance")}
        finite = {name: x if x is None or math.isfinite(x) else None for name, x in numbers.items()}
        return {"check": self.check, "verdict": self.verdict, **finite, "note": self.note}


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. ``str()`` is a table, ``to_dict()`` the same for JSON."""

    model: str
    environment: dict[str, str]  # dtype, device, attention, versions
    rows: list[CheckRow] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No check failed, and at least one was made."""
        verdicts = [row.verdict for row in self.rows]
        return FAIL not in verdicts and PASS in verdicts

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"model": self.model, "environment": self.environment, "passed": self.passed, "rows": rows}

    def __str__(self) -> str:
        header = ("check", "largest difference", "the model's own noise", "allowed", "verdict")
        lines = [header, *((row.check, *map(_number, (row.difference, row.noise, row.tolerance)), row.verdict)
                           for row in self.rows)]  # fmt: skip
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = []
        for number, line in enumerate(lines):
            table.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
            if number and (note := self.rows[number - 1].note):
                table += textwrap.wrap(note, 110, initial_indent="    ", subsequent_indent="    ")
        facts = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        verdict = "passed" if self.passed else "FAILED"
        return "\n".join([f"{self.model}: {facts}", "", *table, "", f"verification {verdict}"])


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
