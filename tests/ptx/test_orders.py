"""The fused paths need every order that they ask for, and no more; the emulator finds what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import lines


def check(results: list[dict[str, Any]]) -> None:
    """As they are the paths are right under weak memory, and every planted change of order is found."""
    wrong = [row for row in results if not row["planted"] and row["found"]]
    assert not wrong, wrong
    missed = [row for row in results if row["planted"] and not row["found"]]
    assert not missed, missed


@pytest.mark.usefixtures("built")
def test_weak_memory_gives_right_results_and_a_planted_fault_does_not():
    results = lines("orders.py", "--quick")
    check(results)
    assert sum(bool(row["planted"]) for row in results) == 2


@pytest.mark.emulates_all
@pytest.mark.parametrize("arch", [80, 90])
def test_planted_changes_of_order_are_found(arch):
    results = lines("orders.py", "--arch", str(arch), "--part", "orders")
    check(results)
    assert sum(bool(row["planted"]) for row in results) == 4


@pytest.mark.emulates_all
@pytest.mark.parametrize("arch", [80, 90])
def test_barriers_left_out_are_races(arch):
    dropped = lines("orders.py", "--arch", str(arch), "--part", "barriers")
    alone = [row for row in dropped if row["case"] == "_importance_gap_kernel"]
    assert len(alone) >= 3
    assert all("race in shared memory" in row["found"] for row in alone), alone
    fused = [row for row in dropped if row["case"] == "_score_select_kernel"]  # where some barriers follow each other
    found = ["race in shared memory" in row["found"] for row in fused]
    assert sum(found) * 3 >= len(found) >= 12, fused
