"""What a GPU is given of every kernel, run on an emulator: the results are those of the references, without a race."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import jobs, lines

Results = list[dict[str, Any]]


def errors(results: Results) -> str:
    return "\n".join(f"{row['case']}, sm_{row['arch']}: {row['error']}" for row in results if row["error"])


def check(results: Results, arch: int) -> None:
    (wanted, *rows) = results
    assert not errors(rows), errors(rows)
    ran = {kernel for row in rows for kernel in row["kernels"] if row["arch"] == arch}
    missing = set(wanted["wanted"]) - ran
    assert not missing, f"{missing} never launched on sm_{arch}: give each a case in launches_*.py"


@pytest.mark.usefixtures("built")
def test_every_kernel_gives_what_its_reference_gives():
    results = lines("launches.py", "--quick")
    check(results, 90)
    older = [row for row in results[1:] if row["arch"] == 80]  # other matrix products, other copies
    assert len(older) >= 8


@pytest.mark.emulates_all
@pytest.mark.parametrize("arch", [80, 90])
def test_every_case_gives_what_its_reference_gives(arch):
    check(lines("launches.py", "--arch", str(arch), "--jobs", jobs()), arch)
